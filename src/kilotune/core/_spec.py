"""Constants of noise spec v1 and of the fixed order of sums: shared by the compiled loops and the plain reference."""

import numpy as np

LAWS = ("sign", "gaussian", "uniform")
SIGN, GAUSSIAN, UNIFORM = range(3)  # positions in LAWS

CHUNK = 1 << 16  # elements added or summed together: 256 KiB of float32 stay in a core's cache
PROJECT_CHUNK = 1 << 20  # least number of elements per row of partial sums in tiled_project
LANES = 64  # partial sums side by side: element i goes to lane i mod 64
RMS_FLOOR = float(np.float32(1e-4))
SQRT3 = np.float32(np.sqrt(3.0))  # makes the uniform law's variance 1

# The mixer: a Weyl step and the finalisers of SplitMix64 and of MurmurHash3.
GAMMA = 0x9E3779B97F4A7C15
M1, M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
M3, M4 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53

LN2, SQRT2 = 0.6931471805599453, 1.4142135623730951
ATANH = tuple(1.0 / (2 * k + 1) for k in range(11))  # atanh(s) = s * sum of s^(2k) / (2k+1)

# Algorithm AS 241 (Wichura 1988), routine PPND16: numerator and denominator, constant term first. Its third
# pair, for p < exp(-25), is left out: down to our least p = 2^-53 the second one is off by less than 5e-12.
CENTRAL_NUM = (
    3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
    45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727,
)  # fmt: skip
CENTRAL_DEN = (
    1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
    21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610,
)  # fmt: skip
TAIL_NUM = (
    1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
    1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4,
)  # fmt: skip
TAIL_DEN = (
    1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
    0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9,
)  # fmt: skip

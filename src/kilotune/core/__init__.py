"""What every part stands on: methods, registry, types, noise, random streams, errors."""

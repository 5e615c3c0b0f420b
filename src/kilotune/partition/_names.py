"""Names of made-up clients whose order as text is their order as numbers."""


def client_names(num_clients: int) -> list[str]:
    """client0 .. client9, client00 .. client99, ..."""
    width = len(str(num_clients - 1))
    return [f"client{number:0{width}d}" for number in range(num_clients)]

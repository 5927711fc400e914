"""Lists of who may do what, as flags hold them (spec/device.md 7.11)."""


def allows(allow_list: str, package: str, certificate_digest: str) -> bool:
    """Whether a list of `package` or `package:CERTIFICATE`, separated by commas, names a package; `*` alone names all.

    Case counts, blanks around an entry do not. A package without a certificate is named by its name only.
    """
    if not package:
        return False
    if allow_list.strip() == "*":
        return True
    named = {package, f"{package}:{certificate_digest}"} if certificate_digest else {package}
    return not named.isdisjoint(entry.strip() for entry in allow_list.split(","))


def allows_pair(pair_list: str, first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether a list of `package[:CERTIFICATE];package[:CERTIFICATE]`, separated by commas, names two packages.

    `first`, `second`: package and certificate. A blank list names nobody; `*` alone names all, and in place of a
    package any.
    """
    if pair_list.strip() == "*":
        return bool(first[0] and second[0])
    pairs = (entry.partition(";") for entry in pair_list.split(","))
    return any(allows(left, *first) and allows(right, *second) for left, _, right in pairs)

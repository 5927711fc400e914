"""On whose behalf a device computes (spec/device.md 0, 6.2)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Owner:
    """A vendor's component: package, class, and the hex SHA-256 of the signing certificate."""

    package: str = "fedcompute"
    class_name: str = "fedcompute.Worker"
    certificate_digest: str = "0" * 64

    @property
    def id(self) -> str:
        """The component, by which tokens are kept."""
        return f"{self.package}/{self.class_name}"

    @property
    def digest(self) -> str:
        """The value of the owner header, and the key of everything that is stored for the owner."""
        return f"{self.id}-{self.certificate_digest}"

    def job_id(self, population: str) -> int:
        """Signed 32-bit polynomial hash that names the job of this owner and population (spec 6.2)."""
        text = f"{population}{self.package}-{self.class_name}-{self.certificate_digest}".encode("utf-16-le")
        value = 0
        for index in range(0, len(text), 2):
            value = (31 * value + int.from_bytes(text[index : index + 2], "little")) & 0xFFFFFFFF
        return value - (1 << 32) if value >= 1 << 31 else value

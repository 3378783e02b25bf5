"""The counting backbone and its images, as for features."""

from tests.features.conftest import backbone, other_backbone, paths  # noqa: F401

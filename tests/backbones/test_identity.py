"""A fingerprint is the same wherever it was computed, cheap to ask for, and never of something that lasts a moment."""

from __future__ import annotations

import pytest

from clipadapt.backbones import load_backbone
from tests.tiny import tiny

# of the code before models, towers and edits had classes of their own: caches and saved models carry these
DIGESTS = {
    "clip": ("7883c2232c3f0be89ebf280133845281", "bd710e216b61948d1a66ac8190d4a302"),
    "siglip": ("d8499ab8c4d503f7ad690fc86a1320b2", "5aaf07cae87e8865b4850a224ebf1743"),
    "siglip2": ("154239ee65c3bb0ec3e5c66ae50049ea", "8179c9204b23bcec2cfa78d33dda2df4"),
    "metaclip_2": ("441781dc0fbea79742ed6e4926cc463b", "2f447c52336545c035ea8e447e1479f5"),
    "altclip": ("27ecfc4c68bc6ebb2fb5b12de69f199d", "9e6e875dfbbe7d85a25ba51c2a3052a8"),
    "chinese_clip": ("85b6a8ced0c0ca732730efaac3232d02", "30cd10305c00c44fb91e7a774453ad2e"),
    "embedded": ("2a2eed0d2d8f3e500d3219120be40fb6", "3d320f73a5d380989c2877a14265a705"),
}


@pytest.mark.parametrize("family", sorted(DIGESTS))
def test_fingerprints_are_those_of_before(family):
    backbone = load_backbone("embedded" if family == "embedded" else tiny(family))
    assert (backbone.fingerprint, backbone.image_fingerprint) == DIGESTS[family]

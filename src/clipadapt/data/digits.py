"""Handwritten digits, which come with scikit-learn: real images on every machine."""

from __future__ import annotations

from clipadapt.data.examples import Dataset
from clipadapt.data.readers.lists import image_list

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def handwritten_digits() -> Dataset:
    """1,797 scans of 8 x 8 grey values (E. Alpaydin and C. Kaynak, UCI 1998), as dark ink on white paper."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = 255 - (digits.images * (255 / 16)).round()  # (N, 8, 8), values 0..16 -> 255..0
    return image_list(ink.astype("uint8"), digits.target, DIGITS, name="handwritten digits")

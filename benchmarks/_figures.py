"""How matplotlib draws the figures of these scripts: the same numbers give the same file."""

from typing import Any

AS_IT_IS: Any = {"parse_math": False}  # names of files may hold $, between which matplotlib reads formulas
STYLE: Any = {"svg.hashsalt": "sparlow", "svg.fonttype": "none", "font.size": 9}

"""The type checker that pytest puts around Holdall's functions, where an int will do as a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

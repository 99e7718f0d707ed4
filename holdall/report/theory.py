from pathlib import Path


def save(path: Path) -> None: ...

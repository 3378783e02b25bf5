"""A dictionary of eight meanings in WordNet's file format."""

from __future__ import annotations

from pathlib import Path

# id, lemmas, pointers, gloss
SENSES = [
    ("00001930", ["physical_entity"], [], "an entity that has physical existence"),
    ("00015388", ["animal"], ["@ 00001930"], 'a living organism; "animals move"'),
    ("02084071", ["dog", "domestic_dog"], ["@ 00015388"], 'a member of the genus Canis; "the dog barked all night"'),
    ("02012849", ["crane"], ["@ 00015388"], "large long-necked wading bird"),
    ("03126707", ["crane", "lifting_device"], ["@ 00001930"], "lifts and moves heavy objects"),
    ("05833840", ["idea"], [], "the content of cognition"),
    ("09999999", ["fido"], ["@i 02084071"], "a single dog"),
    ("01887787", ["cow"], ["@ 05833840"], "no physical thing here"),
]
INDEX = {
    "animal": ["00015388"],
    "cow": ["01887787"],
    "crane": ["03126707", "02012849"],
    "dog": ["02084071"],
    "domestic_dog": ["02084071"],
    "fido": ["09999999"],
    "idea": ["05833840"],
    "lifting_device": ["03126707"],
    "physical_entity": ["00001930"],
}
COUNTS = ["dog%1:05:00:: 1 42", "crane%1:06:00:: 1 4", "crane%1:05:00:: 2 1", "run%2:38:00:: 1 106"]


def write_dictionary(folder: Path) -> Path:
    """Write it below `folder`, as the unpacked package of Debian has it; gives `folder`."""
    place = folder / "usr/share/wordnet"
    place.mkdir(parents=True)
    licence = "  1 This software and database is being provided to you, the LICENSEE\n"
    lines = [
        f"{number} 05 n {len(names):02x} {' '.join(f'{name} 0' for name in names)} {len(pointers):03d} "
        f"{''.join(f'{pointer} n 0000 ' for pointer in pointers)}| {gloss}  \n"
        for number, names, pointers, gloss in SENSES
    ]
    (place / "data.noun").write_text(licence + "".join(lines))
    entries = [f"{name} n {len(ids)} 1 @ {len(ids)} 1 {' '.join(ids)}  \n" for name, ids in INDEX.items()]
    (place / "index.noun").write_text(licence + "".join(entries))
    (place / "cntlist.rev").write_text("".join(f"{line}\n" for line in COUNTS))
    return folder

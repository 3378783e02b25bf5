"""Find pictures of a folder by words, by a picture, and by a class that an adapted model learned.

    python examples/search_folder.py photos/ "a red star"

Without arguments it draws itself a folder of pictures, so that it runs as it is. Needs clipadapt[search].
"""

import sys
import tempfile
from pathlib import Path

import clipadapt
from clipadapt.data import image_files
from clipadapt.embeddings import encode_shard
from clipadapt.search import Hit, Index, near_duplicates, query_vector


def drawn_folder(root: Path) -> Path:
    """A folder per colour, with stars and hearts."""
    playground = clipadapt.Playground(kinds=("star", "heart"))
    for number in range(40):
        colour = ("red", "blue", "green", "yellow")[number % 4]
        folder = root / colour
        folder.mkdir(parents=True, exist_ok=True)
        playground.scene(number, colour=colour).image.save(folder / f"{number:03}.png")
    return root


def show(title: str, hits: list[Hit]) -> None:
    print(title)
    for hit in hits:
        print(f"  {hit.rank}. {hit.score:.3f} {hit.name}")


def main(photos: Path, text: str, embedded: Path) -> None:
    backbone = clipadapt.load_backbone()  # the embedded model; give a hub id or a folder for a larger one
    encode_shard(backbone, image_files(photos), embedded)
    index = Index.open(embedded, backbone)

    queries = [query_vector(backbone, text), query_vector(backbone, text, images=index.embeddings.names[0])]
    by_text, by_both = index.search(queries, k=5)
    show(f"{text}:", by_text)
    show(f"{text}, and like {index.embeddings.names[0]}:", by_both)

    data = clipadapt.image_folder(photos)
    model = clipadapt.create("gda-clip").fit(backbone, data.few_shot(4, seed=1))
    wanted = data.class_names[-1]
    hits = Index.open(embedded, model).search_class(wanted, k=5)  # the pictures are not encoded again
    show(f"the class {wanted}, of an adapted model:", hits)
    right = sum(Path(hit.name).parent.name == wanted for hit in hits)
    print(f"{100 * right / len(hits):.0f} % of these are in the folder {wanted}")
    print(f"{len(near_duplicates(index.embeddings, 0.98))} groups of near-duplicates")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(sys.argv[1]) if len(sys.argv) > 1 else drawn_folder(Path(scratch, "photos"))
        text = sys.argv[2] if len(sys.argv) > 2 else "a red star"
        main(photos, text, embedded=Path(scratch, "embedded"))

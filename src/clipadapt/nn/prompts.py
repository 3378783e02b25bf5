"""What prompt methods share: the layout of class prompts, their initial vectors, and prompts at several layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clipadapt.backbones import Backbone, Insertion
from clipadapt.backbones.families import TowerName
from clipadapt.errors import ClipadaptError

MEMORY = 2 << 30  # bytes that the prompts of one method may keep for a backward pass


def prompt_layout(
    names: Sequence[Sequence[int]], n_ctx: int, position: str | int, *, before: list[int], after: list[int]
) -> tuple[Tensor, Tensor]:
    """Token ids (C, L) of every class's prompt and the rows (C, n_ctx) that its context vectors take.

    `names` are the classes' token ids, `before` the ids in front of the context (the start token), `after` those at
    the end (the period, the end token). The name stands behind the context ("end"), before it ("front"), or between
    its halves ("middle", the smaller half first), or behind as many vectors as the number `position` says. What the
    context rows hold is overwritten; ids after the end token are zero.
    """
    ahead = position if isinstance(position, int) else {"front": 0, "middle": n_ctx // 2, "end": n_ctx}[position]
    first, placeholder = len(before), names[0][0]
    ids, rows = [], []
    for name in names:
        behind = first + ahead + len(name)
        ids.append([*before, *[placeholder] * ahead, *name, *[placeholder] * (n_ctx - ahead), *after])
        rows.append([*range(first, first + ahead), *range(behind, behind + n_ctx - ahead)])
    return pad_sequence([torch.tensor(row) for row in ids], batch_first=True), torch.tensor(rows).reshape(-1, n_ctx)


def frame(backbone: Backbone) -> tuple[list[int], int]:
    """The ids before a text (none in some families) and the end token's id."""
    *start, end = backbone.tokenize([""])[0].tolist()
    return start, end


def word_ids(backbone: Backbone, text: str) -> list[int]:
    """The token ids of a text without its start and end token."""
    start, end = frame(backbone)
    row = backbone.tokenize([text])[0].tolist()
    return row[len(start) : row.index(end)]


def word_vectors(backbone: Backbone, text: str) -> Tensor:
    """The embeddings of a text's words (n, W), on the CPU, to start a context from."""
    return backbone.embed_tokens(torch.tensor(word_ids(backbone, text))).detach().clone().cpu()


def random_vectors(*shape: int, std: float = 0.02) -> Tensor:
    """Normal start values from torch's global stream (see `seeded`); 0.02 is CoOp's standard deviation."""
    return std * torch.randn(shape)


def first_context(backbone: Backbone, n_ctx: int, words: str | None) -> Tensor:
    """Start values of a context: the embeddings of `words` (n, W), or `n_ctx` random vectors where there are none."""
    return word_vectors(backbone, words) if words else random_vectors(n_ctx, backbone.width("text"))


def split_words(backbone: Backbone, words: str | None, n_ctx: int) -> tuple[Tensor, str]:
    """Start values (n_ctx, W) from the first tokens of `words`, and the words left over, which stay as they are.

    "a photo of a" with n_ctx = 2: the vectors of "a photo", and "of a". Where there are fewer tokens than n_ctx, the
    vectors are random and no word is left. A word that is cut in two does not stay.
    """
    if not words or len(word_ids(backbone, words)) < n_ctx:
        return random_vectors(n_ctx, backbone.width("text")), ""
    parts = words.split()
    taken = next(k for k in range(1, len(parts) + 1) if len(word_ids(backbone, " ".join(parts[:k]))) >= n_ctx)
    return word_vectors(backbone, words)[:n_ctx], " ".join(parts[taken:])


def deep_vectors(
    backbone: Backbone, tower: TowerName, n_ctx: int, depth: int, first: Tensor | None = None
) -> list[Tensor]:
    """Start values (n_ctx, W) of prompts for each of the first min(depth, blocks) blocks of a tower.

    All are random (`random_vectors`), but those at the input are `first` where it is given.
    """
    shape = n_ctx, backbone.width(tower)
    count = min(depth, len(backbone.blocks(tower)))
    first = random_vectors(*shape) if first is None else first
    return [first, *(random_vectors(*shape) for _ in range(count - 1))]


class ClassPrompts:
    """One prompt for each class with `n_ctx` rows for learned vectors, encoded without waste (`PromptEncoder`).

        start [v_1 .. v_n] {words} NAME {ending} end          position "end"

    ids   (C, L) token ids
    rows  (C, n_ctx) the rows that the learned vectors take

    `words` are fixed ones between the vectors and the name (MaPLe keeps "of a" of "a photo of a" with two vectors),
    `ending` what follows the name, such as "." or ", a type of pet.".
    `memory` is what a call may keep for its backward pass, in bytes (`Backbone.prompt_encoder`); several sets of
    prompts that are encoded in one step share `MEMORY` between them.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        n_ctx: int,
        *,
        position: str | int = "end",
        words: str = "",
        ending: str = ".",
        memory: int = MEMORY,
    ) -> None:
        start, end = frame(backbone)
        fixed = word_ids(backbone, words) if words else []
        names = [[*fixed, *word_ids(backbone, name.replace("_", " "))] for name in class_names]
        after = [*word_ids(backbone, ending), end] if ending else [end]
        longest = max(range(len(names)), key=lambda c: len(names[c]))
        length = len(start) + len(names[longest]) + n_ctx + len(after)
        if length > backbone.context_length:
            raise ClipadaptError(
                f"{n_ctx} context vectors and the class name {class_names[longest]!r} make {length} tokens; "
                f"{backbone.source} takes {backbone.context_length}: choose a smaller n_ctx or a shorter name."
            )
        ids, rows = prompt_layout(names, n_ctx, position, before=start, after=after)
        self.ids, self.rows = ids.to(backbone.device), rows.to(backbone.device)
        self.encoder = backbone.prompt_encoder(self.ids, memory=memory)

    def encode(self, context: Tensor, deeper: Sequence[Tensor] = (), *, normalize: bool = True) -> Tensor:
        """Text features (C, D), or (G, C, D), with these vectors in the context rows.

        context  (n, W), (C, n, W), or with groups (G, 1, n, W) or (G, C, n, W); see `PromptEncoder`
        deeper   vectors of the same kinds that overwrite the context rows before block 1, 2, ...
        """
        layers: list[int | str] = ["input", *range(1, len(deeper) + 1)]
        insertions = [
            Insertion(tokens, at=self.rows, layer=layer)  # type: ignore[arg-type]
            for tokens, layer in zip([context, *deeper], layers, strict=True)
        ]
        return self.encoder(insertions, normalize=normalize)


def visual_prompts(first: Tensor, deeper: Sequence[Tensor] = ()) -> list[Insertion]:
    """Prompts behind the patches of an image: `first` (n, W) at the input, `deeper` before block 1, 2, ... (VPT)."""
    count = first.shape[-2]
    inserted = Insertion(first, at=-count, mode="insert")
    return [inserted, *(Insertion(tokens, at=-count, layer=j) for j, tokens in enumerate(deeper, start=1))]

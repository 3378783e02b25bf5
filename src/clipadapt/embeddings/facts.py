"""The facts that an embedding keeps of its images: read from their heads, written to and read from Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clipadapt.data.items import EncodedItem, Item, hash_bytes, header
from clipadapt.embeddings.listing import arrow

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

OWN = ("name", "digest")  # columns that are the library's; a source's own of these names are called source_…


@dataclass(frozen=True)
class NotedItem(Item):
    """An image whose head is looked at when its bytes are read anyway, for the digest."""

    item: Item
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.item.name

    def open(self) -> Image.Image:
        return self.item.open()

    def open_reduced(self, least: int) -> Image.Image:
        return self.item.open_reduced(least)

    def fetched(self) -> Item:
        item = self.item.fetched()
        return self if item is self.item else NotedItem(item, self.facts)

    def digest(self) -> str:
        if not isinstance(self.item, EncodedItem):
            return self.item.digest()
        data = self.item.read()
        self.facts.update(header(data))
        return hash_bytes(data)


def table_of(kept: Sequence[NotedItem], digests: Sequence[str], known: pyarrow.Table) -> pyarrow.Table:
    """A row per image: its name and digest, what its head says, and what was `known` of it, which goes before that."""
    pa = arrow()
    taken = [item.facts.get("taken") for item in kept]
    columns = {
        "name": pa.array([item.name for item in kept], pa.string()),
        "digest": pa.array(digests, pa.string()),
        "width": pa.array([item.facts.get("width") for item in kept], pa.int32()),
        "height": pa.array([item.facts.get("height") for item in kept], pa.int32()),
        "taken": pa.array(taken, pa.timestamp("ms")),
        "year": pa.array([moment and moment.year for moment in taken], pa.int32()),
    }
    for name in known.column_names:
        columns[f"source_{name}" if name in OWN else name] = known[name]
    return pa.table(columns)


def join_tables(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """The tables of all parts as one; a column of numbers in one part and of text in another becomes text."""
    pa = arrow()
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        return pa.concat_tables(
            [_as_text(table, _mixed_columns(tables)) for table in tables], promote_options="permissive"
        )


def _mixed_columns(tables: Sequence[pyarrow.Table]) -> set[str]:
    """The columns whose types in different parts have none in common."""
    pa, schemas = arrow(), [table.schema for table in tables]
    mixed = set()
    for name in {name for schema in schemas for name in schema.names}:
        kinds = {schema.field(name).type for schema in schemas if name in schema.names}
        try:
            pa.unify_schemas([pa.schema([(name, kind)]) for kind in kinds], promote_options="permissive")
        except pa.ArrowException:
            mixed.add(name)
    return mixed


def _as_text(table: pyarrow.Table, columns: set[str]) -> pyarrow.Table:
    for place, name in enumerate(table.column_names):
        if name in columns:
            table = table.set_column(place, name, table[name].cast(arrow().string()))
    return table

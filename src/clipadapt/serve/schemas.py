"""The bodies of requests and answers, as pydantic models; a field that is not known is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


def _whole(value: Any) -> Any:
    """20.0 as 20: in JSON both are the same integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Top = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)]
File = Annotated[bytes, Strict()]  # so that a form's text field is not a file


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Form(BaseModel):
    """The fields of a multipart form, all of which arrive as text, or as the bytes of a file."""

    model_config = ConfigDict(extra="forbid")


class ClassifyForm(_Form):
    """The form of /v1/classify."""

    image: Annotated[list[File], Field(min_length=1, description="Images.")]
    model: Annotated[str | None, Field(description="Its id; without it the first model.")] = None
    top: Annotated[Top, Field(description="How many classes to name.")] = 5


class ExplainForm(_Form):
    """The form of /v1/explain: an image, and a text or a class."""

    image: File
    text: Annotated[str | None, Field(description="What to look for.")] = None
    class_: Annotated[str | None, Field(alias="class", description="Instead of text: a class of the model.")] = None
    model: str | None = None


class SearchRequest(_Request):
    """A search by texts, as JSON."""

    index: Annotated[str | None, Field(description="Its id; without it the first index.")] = None
    texts: Annotated[list[str], Field(description="What the images should show.")] = []
    minus: Annotated[list[str], Field(description="What they should not show.")] = []
    top: Top = 20
    where: Annotated[str | None, Field(description="A condition on the facts, such as `year > 2020`.")] = None
    model: Annotated[str | None, Field(description="Encodes the query; without it the index's own.")] = None


class SearchForm(_Form):
    """A search by images, by texts, or by both, as a form."""

    image: Annotated[list[File], Field(description="Images that the hits should resemble.")] = []
    texts: list[str] = []
    minus: list[str] = []
    index: str | None = None
    top: Top = 20
    where: str | None = None
    model: str | None = None


class ImageInput(_Request):
    """An image to embed."""

    image: Annotated[str, Field(pattern=r"^data:image/[a-z0-9.+-]+;base64,", description="A data URI.")]


class EmbeddingsRequest(_Request):
    """OpenAI's request, with images as well as texts."""

    input: str | Annotated[list[str | ImageInput], Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: Annotated[str | None, Field(description="Accepted for OpenAI's clients and ignored.")] = None


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str


class ErrorAnswer(BaseModel):
    """The answer to every request that fails."""

    error: Error


class HealthAnswer(BaseModel):
    """The answer of /healthz."""

    status: Literal["ok", "stopping"]
    models: int


class BackboneInfo(BaseModel):
    """Where a backbone comes from."""

    source: str
    fingerprint: str


class ModelInfo(BaseModel):
    """A served model."""

    id: str
    method: Annotated[str | None, Field(description="null: a plain backbone, without classes.")]
    classes: list[str]
    multi_label: bool
    revision: str
    backbone: BackboneInfo


class IndexInfo(BaseModel):
    """An index that can be searched."""

    id: str
    images: int
    pictures: Annotated[int, Field(deprecated=True, description="The old name of images.")]


class ModelsAnswer(BaseModel):
    """The answer of /v1/models."""

    data: list[ModelInfo]
    indexes: list[IndexInfo]


class Prediction(BaseModel):
    """A class and its probability in [0, 1]."""

    class_: Annotated[str, Field(alias="class")]
    probability: float


class Predictions(BaseModel):
    """The classes of an image, the most probable first."""

    predictions: list[Prediction]


class ImageError(BaseModel):
    """Why an image of a request has no predictions."""

    error: str


class ClassifyAnswer(BaseModel):
    """The answer of /v1/classify, one result for each image."""

    model: str
    revision: str
    results: list[Predictions | ImageError]


class Embedding(BaseModel):
    """The unit vector of an input."""

    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float] | str, Field(description="With base64: little-endian float32.")]


class Usage(BaseModel):
    """OpenAI's count of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """The answer of /v1/embeddings, one vector for each input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class HitInfo(BaseModel):
    """An image that was found."""

    id: int
    score: float
    name: str
    facts: dict[str, Any]


class SearchAnswer(BaseModel):
    """The answer of /v1/search, the best hit first."""

    hits: list[HitInfo]


class ExplainAnswer(BaseModel):
    """The answer of /v1/explain: a heat map."""

    grid: Annotated[list[int], Field(description="[rows, columns]")]
    box: Annotated[
        list[float],
        Field(description="The part of the image that the patches cover: left, top, right, bottom, in [0, 1]."),
    ]
    scores: Annotated[
        list[list[float]],
        Field(description="How much each patch fits the text, row by row; 0 is no better than an arbitrary text."),
    ]
    score: Annotated[float, Field(description="Cosine of the whole image with the text.")]

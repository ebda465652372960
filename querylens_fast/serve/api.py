"""The JSON API, /api/v1: what `Results` answers, under its names. OpenAPI at /api/openapi.json, a page at /api/docs.

Errors are ``{"error": "…"}``: 404 for what does not exist, 410 for a result that has changed or gone, 422 for a value
that cannot be, 503 for a query that took too long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, with_config

from querylens_fast.queries import inventory, views
from querylens_fast.queries.budget import Budget
from querylens_fast.queries.inventory import DictionaryInfo, Progress, Skipped
from querylens_fast.queries.query import MAX_TEXT, Filter
from querylens_fast.queries.results import Results
from querylens_fast.queries.views import (
    BOUNDS,
    MAX_LIMIT,
    ORDERS,
    Comparison,
    End,
    FeatureView,
    Page,
    Side,
    Token,
    TokenView,
)

MAX_ID = 1 << 53
"""Ids are numbers in JSON."""


class Json(JSONResponse):
    """Dataclasses as JSON; numbers that are not finite as null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of a dataclass, list or dictionary."""
        return orjson.dumps(content)


@dataclass(frozen=True)
class Overview:
    """What there is."""

    version: str
    """Of the API."""
    dictionaries: tuple[DictionaryInfo, ...]
    """By layer and name."""
    progress: tuple[Progress, ...]
    """Runs that are not finished."""
    skipped: tuple[Skipped, ...]
    """Files in the given folders that are not served."""


@dataclass(frozen=True)
class Place:
    """Where a feature is."""

    dictionary: str
    """Its slug."""
    feature: int
    """The feature's number."""


@dataclass(frozen=True)
class Problem:
    """Why there is no answer."""

    error: str
    """What was wrong with the request, or with the results."""


for _kind in (*vars(views).values(), *vars(inventory).values(), Overview, Place, Problem):
    if is_dataclass(_kind):
        with_config(ConfigDict(use_attribute_docstrings=True))(_kind)  # for the OpenAPI document

Slug = Annotated[str, Query(max_length=200, description="A dictionary's slug.")]
OptionalSlug = Annotated[str | None, Query(max_length=200, description="A dictionary's slug; by default all.")]
Dictionary = Annotated[str, Path(description="A dictionary's slug.")]
Feature = Annotated[int, Path(ge=0, le=MAX_ID, description="The feature's number.")]
TokenId = Annotated[int, Path(ge=0, le=MAX_ID, description="In the model's vocabulary.")]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Rows of the page.")]
After = Annotated[str | None, Query(max_length=2000, description="The `next` of the page before.")]
Preset = Annotated[
    str | None, Query(max_length=200, description="A preset's name or label; by default the best known.")
]
Bound = Annotated[float | None, Query(description="Features below (_min) or above (_max) are left out.")]

router = APIRouter(
    prefix="/api/v1",
    tags=["results"],
    default_response_class=Json,
    responses={code: {"model": Problem} for code in (401, 404, 410, 421, 422, 503)},
)


class Asked(BaseModel):
    """Parameters of a list; others are refused."""

    model_config = ConfigDict(extra="forbid")

    side: Annotated[Side | None, Query(description="Look into signatures of one side; by default both.")] = None
    end: Annotated[End, Query(description="Look among the highest or the lowest tokens.")] = "top"
    preset: Preset = None
    dictionary: OptionalSlug = None
    layer: Annotated[int | None, Query(ge=0, le=MAX_ID, description="Of the dictionaries; by default all.")] = None
    order: Annotated[
        str | None, Query(max_length=40, description=f"{', '.join(ORDERS)}; - before it for the largest first.")
    ] = None
    after: After = None
    limit: Limit = 50
    score_min: Bound = None
    score_max: Bound = None
    rel_var_min: Bound = None
    rel_var_max: Bound = None
    stable_k_min: Bound = None
    stable_k_max: Bound = None
    input_score_min: Bound = None
    input_score_max: Bound = None
    output_score_min: Bound = None
    output_score_max: Bound = None
    density_min: Bound = None
    density_max: Bound = None
    maximum_min: Bound = None
    maximum_max: Bound = None

    def options(self) -> dict[str, Any]:
        """As keyword arguments of `Results.search`."""
        given = self.model_dump()
        bounds = {name: (given.pop(f"{name}_min"), given.pop(f"{name}_max")) for name in BOUNDS}
        filters = tuple(
            Filter(name, -math.inf if low is None else low, math.inf if high is None else high)
            for name, (low, high) in bounds.items()
            if (low, high) != (None, None)
        )
        return {**given, "filters": filters}


class Searched(Asked):
    """Parameters of a search."""

    text: Annotated[str | None, Query(max_length=MAX_TEXT, description="A token; without one, all features.")] = None
    token_id: Annotated[int | None, Query(ge=0, le=MAX_ID, description="In place of a text.")] = None
    exact: Annotated[bool, Query(description="Do not look for the text with a space before it, too.")] = False


class Compared(BaseModel):
    """Parameters of a comparison."""

    model_config = ConfigDict(extra="forbid")

    dictionary: Slug
    other: Annotated[str | None, Query(max_length=200, description="Another slug; by default the same.")] = None
    preset: Preset = None
    other_preset: Annotated[
        str | None,
        Query(max_length=200, description="By default the same, or within one dictionary another of its side."),
    ] = None
    after: After = None
    limit: Limit = 50


@router.get("/dictionaries", response_model=Overview)
def dictionaries(request: Request) -> Json:
    """The dictionaries with their results, runs that are not finished, and files that are not served."""
    results = _results(request)
    return Json(Overview("v1", results.dictionaries, results.progress, results.skipped))


@router.get("/features/{dictionary}/{feature}", response_model=FeatureView)
def feature(request: Request, dictionary: Dictionary, feature: Feature) -> Json:
    """All that the results hold of a feature."""
    return Json(_results(request).feature(dictionary, feature, budget=_budget(request)))


@router.get("/search", response_model=Page)
def search(request: Request, asked: Annotated[Searched, Query()]) -> Json:
    """Features whose signatures hold a token, or all features, filtered and ordered."""
    return Json(_results(request).search(**asked.options(), budget=_budget(request)))


@router.get("/tokens", response_model=list[Token])
def tokens(
    request: Request,
    text: Annotated[str, Query(max_length=MAX_TEXT, description="A part of the tokens, in any case.")],
    limit: Limit = 10,
) -> Json:
    """Tokens that contain a text, the shortest first."""
    return Json(_results(request).tokens(text, limit=limit))


@router.get("/tokens/{token_id}", response_model=TokenView)
def token(request: Request, token_id: TokenId, limit: Limit = 10) -> Json:
    """A token's first features in every dictionary, on both sides, at the top and at the bottom."""
    return Json(_results(request).token(token_id, limit=limit, budget=_budget(request)))


@router.get("/random", response_model=Place)
def random(
    request: Request,
    dictionary: OptionalSlug = None,
    seed: Annotated[int | None, Query(ge=0, le=MAX_ID, description="For the same draw each time.")] = None,
) -> Json:
    """A feature drawn at random."""
    return Json(Place(*_results(request).random(dictionary, seed=seed)))


@router.get("/compare", response_model=Comparison)
def compare(request: Request, asked: Annotated[Compared, Query()]) -> Json:
    """Two presets of a dictionary feature by feature, or two dictionaries with their features matched."""
    return Json(_results(request).compare(**asked.model_dump(), budget=_budget(request)))


def _results(request: Request) -> Results:
    return request.app.state.results


def _budget(request: Request) -> Budget:
    return request.state.budget

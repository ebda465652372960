"""The HTML pages: what queries answer, rendered by templates/. Every state of a page is in its address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from querylens_fast.queries.budget import Budget
from querylens_fast.queries.catalog import PREFERRED
from querylens_fast.queries.files import ResultGone
from querylens_fast.queries.inventory import DictionaryInfo
from querylens_fast.queries.results import Results
from querylens_fast.queries.views import BOUNDS, FIELDS
from querylens_fast.serve.asked import bound, filters, number_of, whole
from querylens_fast.serve.markup import (
    FIELD_NAMES,
    Links,
    by_side,
    chief,
    environment,
    feature_context,
    preset_name,
    query,
)
from querylens_fast.serve.plots import LinePlot, line_plot

if TYPE_CHECKING:
    from querylens_fast.serve.try_it import Firing, TryIt

PAGES = (("/", "Overview"), ("/search", "Search"), ("/compare", "Compare"), ("/try", "Try it"))
SHORT = 10
"""Tokens of each list on a feature page, unless all are asked for."""
ROWS = 25
"""Features on a page of results."""
USUAL_COLUMNS = ("rel_var", "density")

EXPLAINED = {
    404: ("Not found", "Look for it by a token or a feature number in the box above."),
    410: (
        "The result has changed",
        "Its file was replaced, shortened or removed while it was read. Load the page again; the overview shows what "
        "is left.",
    ),
    422: ("This address cannot be answered", "Change the value that is named, or begin with an empty search."),
    500: ("The server made a mistake", "Its log says which. Other pages may work."),
    503: ("That took too long", "Ask for one dictionary, fewer filters or a shorter text."),
}
"""Title and advice of error pages, by status."""

templates = cache(environment)


router = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)


@router.get("/")
def overview(request: Request) -> HTMLResponse:
    """The dictionaries, their relative variance by layer, and runs that are not finished."""
    results = _results(request)
    found = results.dictionaries
    scored = [d for d in found if d.mean_scores]
    return _page(
        request,
        "overview",
        dictionaries=found,
        total=sum(d.n_features for d in found),
        models=sorted({d.model for d in found}),
        progress=results.progress,
        skipped=results.skipped,
        rel_var=_rel_var_plot(found),
        scored=scored,
        score_names=sorted({name for d in scored for name in d.mean_scores}),
    )


@router.get("/search")
def search(request: Request) -> HTMLResponse:
    """Features by token, text, number and filters, a page of the list at a time."""
    results, known = _results(request), _results(request).dictionaries
    names = ("q", "token", "exact", "dictionary", "side", "end", "preset", "layer", "order", "after")
    asked = {
        n: request.query_params.get(n, "") for n in (*names, *(f"{f}_{b}" for f in BOUNDS for b in ("min", "max")))
    }
    text = asked["q"] or None
    asked["token"] = "" if text else asked["token"]  # a form that was filled in keeps the token it began with
    token = whole(asked["token"], "token")
    by_token = text is not None or token is not None
    bounds = [f for f in filters(asked) if by_token or f.field != "score"]
    order = asked["order"] if by_token or asked["order"].lstrip("-") != "score" else ""
    page = results.search(
        text,
        token_id=token,
        exact=asked["exact"] == "1",
        filters=bounds,
        dictionary=asked["dictionary"] or None,
        side=asked["side"] or None,
        end=asked["end"] or "top",
        preset=asked["preset"] or None,
        layer=whole(asked["layer"], "layer"),
        order=order or None,
        after=asked["after"] or None,
        limit=ROWS,
        budget=_budget(request),
    )
    fields = [f for f in FIELDS if any(f in d.fields for d in known)]
    used = {f.field for f in bounds} | {order.lstrip("-")}
    return _page(
        request,
        "search",
        asked=asked,
        page=page,
        by_token=by_token,
        numbered=_numbered(known, asked),
        columns=[f for f in fields if f in used or f in USUAL_COLUMNS],
        filter_fields=["score"] * by_token + fields,
        filtered=bool(bounds) or asked["layer"] != "" or asked["exact"] != "" or asked["preset"] != "",
        dictionary_options=[("", "all"), *((d.slug, d.slug) for d in known)],
        order_options=_orders(fields, by_token),
        first="/search" + query(asked, after=None),
        following="/search" + query(asked, after=page.next),
    )


@router.get("/feature/{dictionary}/{feature}")
def feature(request: Request, dictionary: str, feature: str) -> HTMLResponse:
    """All that is known of a feature."""
    results = _results(request)
    view = results.feature(dictionary, number_of(feature, "feature"), budget=_budget(request))
    everything = request.query_params.get("rows") == "all"
    return _page(request, "feature", **feature_context(view), all=everything, limit=None if everything else SHORT)


@router.get("/token/{token}")
def token(request: Request, token: str) -> HTMLResponse:
    """A token's features in every dictionary; those that have it among their lowest tokens when asked for."""
    view = _results(request).token(number_of(token, "token"), limit=5, budget=_budget(request))
    top = tuple(group for group in view.groups if group.end == "top")
    groups = view.groups if request.query_params.get("ends") == "both" or not top else top
    return _page(request, "token", view=view, groups=groups)


@router.get("/random")
def random(request: Request) -> RedirectResponse:
    """To a feature drawn at random."""
    slug, chosen = _results(request).random(request.query_params.get("dictionary") or None)
    return RedirectResponse(f"/feature/{quote(slug)}/{chosen}", 303, {"Cache-Control": "no-store"})


@router.get("/compare")
def compare(request: Request) -> HTMLResponse:
    """Two presets of a dictionary, or two dictionaries with their features matched."""
    results, known = _results(request), _results(request).dictionaries
    choices = [(d.slug, [(f"{d.slug}/{p.preset}", f"{d.slug} {_of_side(p)}") for p in d.presets]) for d in known]
    asked = {n: request.query_params.get(n, "") for n in ("a", "b", "after")}
    asked = {**asked, **_compared(known, asked["a"], asked["b"])}
    first, second = (asked[n].partition("/") for n in ("a", "b"))
    found = problem = None
    try:
        if asked["a"]:
            found = results.compare(
                first[0],
                second[0],
                preset=first[2] or None,
                other_preset=second[2] or None,
                after=asked["after"] or None,
                limit=ROWS,
                budget=_budget(request),
            )
    except ResultGone:
        raise
    except ValueError as error:
        problem = str(error)
    return _page(
        request,
        "compare",
        422 if problem else 200,
        problem=problem,
        choices=choices,
        asked=asked,
        found=found,
        first="/compare" + query(asked, after=None),
        following="/compare" + query(asked, after=found and found.next),
    )


@router.get("/try")
def try_page(request: Request) -> HTMLResponse:
    """Which features fire at each token of a text; the text under a steered feature."""
    tried: TryIt | None = request.app.state.try_it
    asked = {n: request.query_params.get(n, "") for n in ("text", "prompt", "dictionary", "feature", "strength", "n")}
    asked["n"] = asked["n"] or "20"
    firing = steered = problem = None
    slugs = [] if tried is None else list(tried.dictionaries)
    if tried is not None and (asked["text"] or asked["prompt"]):
        from querylens_fast.serve.try_it import Busy, TooLong

        if asked["dictionary"] not in slugs:
            raise LookupError(f"dictionary is {asked['dictionary']!r}; those that can be run: {', '.join(slugs)}")
        try:
            if asked["text"]:
                firing = tried.firing(asked["dictionary"], asked["text"])
            else:
                chosen, n = number_of(asked["feature"], "feature"), number_of(asked["n"], "n")
                strength = bound(asked["strength"], "strength") or 0.0
                steered = tried.steer(asked["dictionary"], chosen, strength, asked["prompt"], n)
        except (ValueError, LookupError, Busy, TooLong) as error:
            problem = str(error)
    return _page(
        request,
        "try",
        422 if problem else 200,
        dictionaries=slugs,
        asked=asked,
        firing=firing,
        steered=steered,
        problem=problem,
        limits={} if tried is None else tried.limits,
        tokens_of={} if firing is None else _written(_results(request), firing),
    )


@router.get("/api/docs")
def documentation(request: Request) -> HTMLResponse:
    """The JSON API on one page."""
    operations = [
        (method.upper(), path, operation)
        for path, methods in request.app.openapi()["paths"].items()
        for method, operation in methods.items()
    ]
    return _page(request, "api", operations=operations, schemas=_schemas(request))


def _schemas(request: Request) -> list[tuple[str, Any]]:
    """The types of the answers, those of problems left out."""
    found = request.app.openapi()["components"]["schemas"]
    return [(name, schema) for name, schema in found.items() if "properties" in schema and "Error" not in name]


def error_page(request: Request, status: int, message: str) -> HTMLResponse:
    """A page that says what is wrong and where to go on."""
    title, advice = EXPLAINED.get(status, EXPLAINED[422 if status < 500 else 500])
    suggestions = [("/", "Overview"), ("/search", "Search")]
    slug = request.path_params.get("dictionary")
    if slug is not None and status == 404:
        known = _results(request).dictionaries
        near = [d for d in known if d.slug == slug] or known[:5]
        suggestions = [(f"/search?dictionary={quote(d.slug)}", f"Features of {d.slug}") for d in near] + suggestions
    return _page(request, "error", status, title=title, message=message, advice=advice, suggestions=suggestions)


def _page(request: Request, name: str, status: int = 200, **context: Any) -> HTMLResponse:
    path = request.url.path
    html = (
        templates()
        .get_template(f"{name}.html.j2")
        .render(pages=PAGES, here=path, asked_query=dict(request.query_params), **context)
    )
    return HTMLResponse(html, status)


def _results(request: Request) -> Results:
    return request.app.state.results


def _budget(request: Request) -> Budget:
    return request.state.budget


def _numbered(known: Sequence[DictionaryInfo], asked: Mapping[str, str]) -> list[tuple[str, str]]:
    """Links to the features whose number was typed."""
    text = asked["q"].strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        return []
    wanted = [d for d in known if asked["dictionary"] in ("", d.slug) and int(text) < d.n_features]
    return [(str(Links().feature(d.slug, int(text))), f"Feature {int(text)} of {d.slug}") for d in wanted[:20]]


def _orders(fields: Sequence[str], by_token: bool) -> list[tuple[str, str]]:
    usual = "best score" if by_token else "number"
    found = [("", usual), *([("feature", "number")] if by_token else [])]
    for field in fields:
        found += [
            (field, f"{FIELD_NAMES[field]}, smallest first"),
            (f"-{field}", f"{FIELD_NAMES[field]}, largest first"),
        ]
    return found


def _of_side(preset: Any) -> str:
    return f"{preset.side}: {preset_name(preset.preset)}"


def _compared(known: Sequence[DictionaryInfo], first: str, second: str) -> dict[str, str]:
    """The two sides of a comparison. By default Logit Lens and the preferred preset of a dictionary that has both, else
    one preset of two dictionaries; empty where there is no preset at all.
    """
    rank = {name: i for i, name in enumerate(PREFERRED)}
    pairs = []
    for d in known:
        best = sorted(d.presets, key=lambda p: rank.get(p.name, len(rank)))
        own = [p for p in best if p.side == best[0].side]
        other = next((p for p in own[1:] if p.transition == "identity"), own[-1] if own else None)
        pairs += [(d.slug, other.preset, own[0].preset)] if other is not None else []
    if pairs:
        slug, other, best = next((pair for pair in pairs if pair[1] != pair[2]), pairs[0])
        beside = next((s for s, _, same in pairs if s != slug and same == best), slug) if other == best else slug
        first, second = first or f"{slug}/{other}", second or f"{beside}/{best}"
    return {"a": first, "b": second}


def _rel_var_plot(found: Sequence[DictionaryInfo]) -> LinePlot | None:
    """Mean rel_var by layer, a line for each kind of dictionary and preset; adaptive presets repeat the full one's."""
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    for d in found:
        for p in d.presets:
            if p.preset in d.rel_var and p.transition != "adaptive":
                lines.setdefault(f"{d.kind}, {_of_side(p)}", []).append((d.layer, d.rel_var[p.preset], None))
    return line_plot(lines, "layer", "mean relative variance")


def _written(results: Results, firing: Firing) -> dict[int, Any]:
    """First value tokens of the features that fire, where the results have them."""
    found = {}
    for one in firing.features:
        try:
            view = results.feature(firing.dictionary, one.feature)
        except LookupError:
            continue
        values = by_side(view).get("value")
        if values:
            found[one.feature] = [t.token for t in chief(values).top[:6]]
    return found

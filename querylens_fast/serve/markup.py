"""What templates are given to write tokens, scores and links: filters, and the Jinja2 environment."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from querylens_fast.queries.catalog import PREFERRED
from querylens_fast.queries.display import MARKS
from querylens_fast.queries.views import FeatureView, Link, Row, ScoredToken, SignatureView, Token
from querylens_fast.serve.plots import histogram

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

LISTED = 6
"""Tokens of each side in a row of a list."""
SHADES = 6
"""Steps of colour on each side of zero."""
NAMES = {
    "logit_lens": "Logit Lens",
    "query_lens": "Query Lens",
    "tuned_lens": "Tuned Lens",
    "token_change": "Token change",
    "zero_out": "Zero out",
    "dashboard": "Dashboard logits",
}
VARIANTS = {"approx": "first order", "adaptive": "adaptive"}
FIELD_NAMES = {
    "score": "score",
    "rel_var": "relative variance",
    "stable_k": "stable tokens",
    "input_score": "input score",
    "output_score": "output score",
    "density": "density",
    "maximum": "largest activation",
}
RELATIONS = {
    "itself": "closest in the same dictionary",
    "neighbours": "closest features",
    "previous residual": "before: residual stream",
    "attention": "before: attention",
    "mlp": "before: MLP",
    "next residual": "after: residual stream",
    "downstream": "features that read it",
    "upstream": "features that write what it reads",
}
SPOKEN = {" ": "space ", "\n": "line end ", "\r": "carriage return ", "\t": "tab ", "\u00a0": "no-break space "}
_MARKED = re.compile(f"([{''.join(MARKS.values())}]+|⟨U\\+[0-9A-F]+⟩)")


@dataclass(frozen=True)
class Links:
    """Addresses of pages; a static report knows only the features it holds, and no tokens.

    Attributes:
        only: The features (dictionary, id) that a static report holds; None in the served pages.
    """

    only: frozenset[tuple[str, int]] | None = None

    def feature(self, dictionary: str | None, feature: int) -> str | None:
        if dictionary is None:
            return None
        if self.only is not None:
            return f"#{dictionary}-{feature}" if (dictionary, feature) in self.only else None
        return f"/feature/{_quoted(dictionary)}/{feature}"


_quoted = lru_cache(1024)(quote)


def chip(token: Token, links: Links, shade: str = "z") -> Markup:
    """A token as a chip, a link where there is a page for it; its text is escaped and isolated from what is around."""
    from markupsafe import Markup

    opening, closing = _chip(token, links.only is None)
    return Markup(f"{opening}{shade}{closing}")


def chips(tokens: Iterable[Token], links: Links, here: Collection[int] = ()) -> Markup:
    """A row of chips without scores; those whose ids are in ``here`` are outlined."""
    from markupsafe import Markup

    linked = links.only is None
    pieces = [_plain(token, linked, token.id in here) for token in tokens]
    return Markup(f'<span class="chips">{"".join(pieces)}</span>')


@lru_cache(1 << 16)
def _plain(token: Token, linked: bool, here: bool) -> str:
    """A chip without a score."""
    opening, closing = _chip(token, linked)
    return f"{opening}{'z here' if here else 'z'}{closing}"


@lru_cache(1 << 16)
def _chip(token: Token, linked: bool) -> tuple[str, str]:
    """The markup before and after a chip's classes."""
    from markupsafe import escape

    text = token.text
    literal = text is None or any(mark in text for mark in MARKS.values()) or "⟨" in text
    pieces = [token.shown] if literal else _MARKED.split(token.shown)
    inner = "".join(f"<i>{escape(p)}</i>" if i % 2 else str(escape(p)) for i, p in enumerate(pieces))
    title = f"token {token.id}" if text is None else f"{text!r}, token {token.id}"
    spoken = "" if text is None else "".join(SPOKEN.get(c, c) for c in text)
    label = f' aria-label="{escape(spoken)}"' if linked and text is not None and spoken != text else ""
    name = "a" if linked else "span"
    link = f' href="/token/{token.id}"' if linked else ""
    closing = f'"{link}{label} title="{escape(_printable(title))}"><bdi dir="{token.direction}">{inner}</bdi></{name}>'
    return f'<{name} class="tok ', closing


def shade(score: float | None, largest: float) -> str:
    """The class of a score's colour: p1 … p6 above zero, n1 … n6 below, z at zero or without a scale."""
    if score is None or not math.isfinite(score) or score == 0 or not largest > 0:
        return "z"
    step = min(SHADES, max(1, math.ceil(SHADES * abs(score) / largest)))
    return f"{'p' if score > 0 else 'n'}{step}"


def signature_rows(tokens: Iterable[ScoredToken], most: float, links: Links) -> Markup:
    """Table rows of a signature: rank, chip, whether it is shared, bar and score. Written here for speed."""
    from markupsafe import Markup

    rows = []
    for rank, t in enumerate(tokens, 1):
        opening, closing = _chip(t.token, links.only is None)
        error = "" if t.se is None else f" <small>±{fixed(t.se)}</small>"
        title = "" if t.se is None else f' title="± {number(t.se, 2)}"'
        rows.append(
            f'<tr><td class="rank">{rank}</td><td class="token">{opening}{shade(t.score, most)}{closing}</td>'
            f'<td class="same">{_shared(t.shared)}</td><td class="track">{score_bar(t.score, t.se, most)}</td>'
            f'<td class="num score"{title}>{fixed(t.score)}{error}</td></tr>'
        )
    return Markup("\n".join(rows))


def list_rows(found: Iterable[Row], columns: Sequence[str], links: Links, named: bool) -> Markup:
    """Table rows of a list of features, with their dictionaries where ``named``. Written here for speed."""
    from markupsafe import Markup, escape

    rows, most = [], largest(r.score for r in found)
    by_token = any(r.score is not None for r in found)
    for r in found:
        cells = [f'<tr><th scope="row"><a href="{links.feature(r.dictionary, r.feature)}">{r.feature}</a></th>']
        if named:
            cells.append(f'<td>{escape(r.dictionary)} <small class="tight">layer {r.layer}</small></td>')
        if by_token:
            cells.append(_found(r, most, links))
        for side, name, tokens in (("key", "reads", r.key_tokens), ("value", "writes", r.value_tokens)):
            here = (r.token.id,) if r.token is not None and r.side == side else ()
            cells.append(f'<td class="whole" data-name="{name}">{chips(tokens[:LISTED], links, here)}</td>')
        for c in columns:
            value = r.values.get(c)
            told = number(int(value) if c == "stable_k" and value is not None else value)
            cells.append(f'<td class="num" data-name="{FIELD_NAMES[c]}">{told}</td>')
        rows.append("".join(cells))
    return Markup("</tr>\n".join([*rows, ""]))


def _found(r: Row, most: float, links: Links) -> str:
    """The cells of the token that was found in a row: chip, side and rank; score."""
    if r.token is None or r.score is None or r.rank is None:
        return "<td></td><td></td>"
    where = f"{r.side}{', lowest' if r.end == 'bottom' else ''}, #{r.rank + 1}"
    return (
        f'<td class="tight">{chip(r.token, links, shade(r.score, most))} <small>{where}</small></td>'
        f'<td class="num" data-name="score">{fixed(r.score)}</td>'
    )


def score_bar(score: float, se: float | None, most: float) -> Markup:
    """A bar of |score| ÷ most with a whisker of one standard error either side. Screen readers have the number."""
    from markupsafe import Markup

    if not (most > 0 and math.isfinite(score)):
        return Markup("")
    long, error = 100 * abs(score) / most, 100 * (se or 0.0) / most
    whisker = f'<path class="whisker" d="M{long - error:.1f} 4.5H{long + error:.1f}"/>' if error else ""
    kind = "p" if score >= 0 else "n"
    return Markup(
        '<svg viewBox="0 0 100 9" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar-{kind}" y="1" width="{long:.1f}" height="7"/>{whisker}</svg>'
    )


@lru_cache(1024)
def _shared(presets: tuple[str, ...]) -> str:
    from markupsafe import escape

    if not presets:
        return ""
    names = escape(", ".join(map(preset_name, presets)))
    return f'<span title="also in {names}">∩<span class="unseen"> shared</span></span>'


def largest(scores: Iterable[float | None]) -> float:
    """The largest finite magnitude; 0 of none."""
    return max((abs(s) for s in scores if s is not None and math.isfinite(s)), default=0.0)


def number(value: float | int | None, digits: int = 3) -> str:
    """A number with so many significant digits, "–" for None; whole numbers in full with thin spaces."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) or value == int(value) and abs(value) >= 10**digits:
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "\u2212")
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "\u2212")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def fixed(value: float, digits: int = 2) -> str:
    """A score with so many decimals and a real minus sign."""
    return f"{value:.{digits}f}".replace("-", "\u2212")


@lru_cache(1024)
def preset_name(label: str) -> str:
    """A preset's label for people: "query_lens_value_approx~2" is "Query Lens, first order (2)"."""
    name, _, copy = label.partition("~")
    for stem, shown in NAMES.items():
        if name.startswith(stem):
            rest = [w for w in name.removeprefix(stem).split("_") if w and w not in ("key", "value")]
            found = ", ".join([shown, *(VARIANTS.get(w, w) for w in rest)])
            break
    else:
        found = name.replace("_", " ")
    return f"{found} ({copy})" if copy else found


def short(name: str) -> str:
    """The last part of a path or of a hub id."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or name


def running(tokens: Iterable[Token]) -> Markup:
    """Tokens as running text on one line: line ends as marks, white space as the browser sets it."""
    from markupsafe import Markup, escape

    text = "".join(t.shown if t.text is None else t.text for t in tokens)
    return Markup(str(escape(text)).replace("\n", "<i>⏎</i> "))


def by_side(view: FeatureView) -> dict[str, list[SignatureView]]:
    """A feature's signatures by side, the key first; Logit Lens, then as they are preferred."""
    found = {
        side: sorted(
            (s for s in view.signatures if s.side == side), key=lambda s: (s.transition != "identity", _rank(s))
        )
        for side in ("key", "value")
    }
    return {side: signatures for side, signatures in found.items() if signatures}


def chief(signatures: Sequence[SignatureView]) -> SignatureView:
    """The signature that stands for a side."""
    return min(signatures, key=_rank)


def _rank(signature: SignatureView) -> int:
    name = signature.preset.partition("~")[0]
    return PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)


def by_relation(links: Sequence[Link]) -> list[tuple[str, list[Link]]]:
    """Links by relation, in the order of `RELATIONS`."""
    found: dict[str, list[Link]] = {}
    for link in links:
        found.setdefault(link.relation, []).append(link)
    rank = {name: i for i, name in enumerate(RELATIONS)}
    return sorted(found.items(), key=lambda group: rank.get(group[0], len(rank)))


def feature_context(view: FeatureView) -> dict[str, Any]:
    """What the parts of a feature's page need besides the view."""
    tokens = [t for s in view.signatures for t in (*s.top, *s.bottom)]
    return {
        "view": view,
        "errors": any(t.se is not None for t in tokens),
        "shared": any(t.shared for t in tokens),
    }


def query(parameters: Mapping[str, Any], **changes: Any) -> str:
    """A query string of the parameters with changes; empty and None ones are left out."""
    merged = {name: value for name, value in {**parameters, **changes}.items() if value not in (None, "")}
    return f"?{urlencode(merged)}" if merged else ""


def environment() -> jinja2.Environment:
    """The templates' environment: autoescape for every file, errors for unknown names.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the pages need jinja2: pip install 'querylens-fast[serve]'") from error
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("querylens_fast.serve", "templates"),
        autoescape=True,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {f.__name__: f for f in (number, fixed, preset_name, short, running, repr)}
    made.globals |= {
        "chip": chip,
        "chips": chips,
        "shade": shade,
        "score_bar": score_bar,
        "signature_rows": signature_rows,
        "list_rows": list_rows,
        "largest": largest,
        "by_relation": by_relation,
        "by_side": by_side,
        "chief": chief,
        "query": query,
        "histogram_plot": histogram,
        "field_names": FIELD_NAMES,
        "relation_names": RELATIONS,
        "links": Links(),
    }
    return made


def _printable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

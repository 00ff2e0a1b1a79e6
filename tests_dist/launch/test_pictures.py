"""Pictures and the page of a plan: what is drawn is the plan; it can be read in grey, small, and without a network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpattn
from cpattn.launch.plan_page import page_of_plan
from cpattn.solver import HARDWARE, Heads

HEADS = Heads(4, 2, 8, 8)
MASK = cpattn.AttnMaskSpec.sliding_window([40, 23, 1], 9) | cpattn.AttnMaskSpec(
    q_ranges=[[4, 64]], k_ranges=[[0, 4]], mask_types=["full"], total_seqlen=64
)


def plan_of(spec: cpattn.AttnMaskSpec = MASK, cp_size: int = 3) -> Any:
    ready = cpattn.make_plan(spec, cp_size=cp_size, num_heads_q=4, num_heads_kv=2, head_dim=8, chunk_size=4)
    return ready.plan


def lightness(colour: Any) -> float:
    """CIE L* of an sRGB colour: what is left of it in grey."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in map(float, colour)]
    y = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize("cp_size", [2, 3, 5, 8, 9, 64])
def test_ranks_differ_in_grey(cp_size: int) -> None:
    """Colours of ranks go from dark to light, and stay off the white of what is masked."""
    pytest.importorskip("matplotlib")
    from cpattn.launch.plan_pictures import rank_colours

    values = [lightness(colour) for colour in rank_colours(cp_size)]
    steps = np.diff(values)
    assert (steps > (5 if cp_size <= 8 else 0)).all()
    assert values[-1] - values[0] > 55
    assert max(values) < 93


def test_what_travels_differs_in_grey() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb

    from cpattn.launch.plan_pictures import COMPUTE, COMPUTE_NEXT, HOME, KEYS, QUERIES
    from cpattn.launch.trace_pictures import COPIES, HEAD_EXCHANGES, WAIT

    for lane in ((COMPUTE, COMPUTE_NEXT, COPIES, WAIT), (KEYS, QUERIES, HOME, HEAD_EXCHANGES)):
        assert np.diff(sorted(lightness(to_rgb(colour)) for colour in lane)).min() > 10, lane


def test_the_figure_can_be_read_650_pixels_wide(tmp_path: Path) -> None:
    """No text of the figure is lower than 9 pixels then, and the title is in it."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from cpattn.launch.plan_pictures import draw_report

    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
        draw_report(plan_of(), tmp_path, heads=HEADS, hardware=HARDWARE["h100"], title="a mask; heads 4:2; 3 ranks")
    texts = [text for text in drawn[0].findobj(Text) if text.get_text().strip()]
    pixels_per_point = 650 / drawn[0].get_figwidth() / 72
    assert min(text.get_fontsize() for text in texts) * pixels_per_point > 9
    assert any("heads 4:2" in text.get_text() for text in texts)


def test_bytes_of_the_picture_are_those_of_the_report() -> None:
    pytest.importorskip("matplotlib")
    from cpattn.launch.plan_pictures import bytes_received
    from cpattn.solver import plan_report

    for schedule in ("keys", "tiles"):
        options: dict[str, Any] = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 8, "schedule": schedule}
        plan = cpattn.make_plan(cpattn.AttnMaskSpec.causal(256), cp_size=4, chunk_size=8, **options).plan
        forward, both = bytes_received(plan, HEADS)
        report = plan_report(plan, heads=HEADS)
        assert both.sum() == report.bytes_total
        assert both.max() == report.bytes_worst
        assert (forward <= both).all()


def page(**how: Any) -> str:
    return page_of_plan(plan_of(**how), heads=HEADS, hardware=HARDWARE["h100"], title="<b> & three ranks")


def test_the_page_asks_no_network() -> None:
    text = page()
    assert not re.search(r"https?:|//[a-z]|<link|src=|@import|fetch\(|XMLHttp", text)
    assert "<title>&lt;b&gt; &amp; three ranks</title>" in text


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here")
    return found


PROBE = """
<script>
const canvas = document.getElementById("mask"), said = [];
const place = (token, from, many, size) => STRIP + (token + 0.5 - from) / many * (size - STRIP);
function ask() {
  for (let q = 0; q < plan.seqlen_q; q++) for (let k = 0; k < plan.seqlen_k; k++) {
    const x = place(k, view.k, view.nk, canvas.clientWidth), y = place(q, view.q, view.nq, canvas.clientHeight);
    const words = sayMask(x, y, canvas), rank = words.match(/computed by rank (\\d+)/);
    said.push([q, k, rank ? +rank[1] : -1]);
  }
}
ask();
Object.assign(view, {q: 8, k: 4, nq: 16, nk: 12}); drawMask();  // zoomed: the same answers
const whole_view = said.slice(); said.length = 0; ask();
const pixel = (q, k) => { whole(); drawMask(); const s = window.devicePixelRatio, c = canvas.getContext("2d");
  const x = place(k, 0, plan.seqlen_k, canvas.clientWidth), y = place(q, 0, plan.seqlen_q, canvas.clientHeight);
  return [...c.getImageData(x * s, y * s, 1, 1).data].slice(0, 3); };
const rgb = rank => colour(rank).match(/\\d+/g).map(Number);
const answers = {drawn: document.body.dataset.drawn, whole: whole_view, zoomed: said,
  pixels: whole_view.map(([q, k, r]) => [r, pixel(q, k), r < 0 ? null : rgb(r)]),
  bar: sayBars("tokens", 1, document.getElementById("tokens")),
  traffic: sayTraffic(document.getElementById("traffic").clientWidth - 2, 2, document.getElementById("traffic")),
  time: sayTimeline(60, 2, document.getElementById("timeline"))};
document.body.textContent = "ANSWERS" + JSON.stringify(answers) + "END";
</script>
"""


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Every cell of a small mask: the rank that is named and the colour drawn are those of the plan, zoomed or not."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1500"]
    file = tmp_path / "plan.html"
    file.write_text(page().replace("</body>", PROBE + "</body>"))
    profile = f"--user-data-dir={tmp_path}/profile"
    done = subprocess.run([*command, profile, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=240)
    found = re.search(r"ANSWERS(.*)END", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    answers = json.loads(html.unescape(found[1]))
    plan, dense = plan_of(), MASK.to_dense()
    ranks = np.full(dense.shape, -1)
    for (q0, q1, k0, k1, lo, hi), rank in zip(_bands(plan), plan.task_ranks, strict=True):
        distance = np.arange(k0, k1)[None] - np.arange(q0, q1)[:, None]
        ranks[q0:q1, k0:k1][(distance >= lo) & (distance <= hi)] = rank
    assert ((ranks >= 0) == dense).all()
    for answer in (answers["whole"], answers["zoomed"]):
        assert all(ranks[q, k] == rank for q, k, rank in answer)
        assert len(answer) == dense.size
    wrong = [(rank, seen) for rank, seen, meant in answers["pixels"] if seen != (meant or [0, 0, 0])]
    assert not wrong
    assert answers["drawn"] == "yes"
    assert answers["bar"].startswith(f"Rank 0 owns tokens: {plan.q_placement.num_tokens[0]}")
    assert answers["traffic"].startswith("From rank 0 to rank 2: ")
    assert answers["time"].startswith("Rank 0 at ")


def _bands(plan: Any) -> list[tuple[int, ...]]:
    tasks = plan.tasks
    return [(*map(int, tasks.data[n, :4]), int(tasks.lo[n]), int(tasks.hi[n])) for n in range(len(tasks))]


@pytest.mark.parametrize("cp_size", [1, 200])
def test_pages_of_one_rank_and_of_many(cp_size: int) -> None:
    text = page(spec=cpattn.AttnMaskSpec.causal(1000), cp_size=cp_size)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert len(data["tokens"]) == cp_size
    assert len(data["traffic"]) == min(cp_size, 128)
    assert len(data["lanes"]) == min(cp_size, 64)

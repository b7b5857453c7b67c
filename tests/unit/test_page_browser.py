"""The page of a run in a real browser: it draws, answers hand and keyboard, can be read, and complains of nothing."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.report.board import open_board
from phi3_dist.report.page import write_comparison, write_page
from phi3_dist.report.sweeps import write_sweep_page
from tests.chromium import Chromium, Page, find_chromium
from tests.unit.test_page import write_run
from tests.unit.test_sweep_page import sweep_folder

STEPS = 80
CONTRAST = """(() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
  const ratio = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));
  const ground = el => { for (; el; el = el.parentElement) { const c = parse(getComputedStyle(el).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const bad = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  for (let node; (node = walker.nextNode());) {
    const el = node.parentElement;
    if (!node.data.trim() || !el.checkVisibility({visibilityProperty: true})) continue;
    if (el.closest('script, style, .unseen, .skip')) continue;
    seen++;
    const found = ratio(parse(getComputedStyle(el).color), ground(el));
    if (found < 4.5) bad.push([el.tagName + '.' + el.className, node.data.trim().slice(0, 30), +found.toFixed(2)]);
  }
  const probe = document.body.appendChild(document.createElement('i'));
  for (let i = 0; i < 8; i++) { probe.style.color = `var(--line-${i})`;
    const found = ratio(parse(getComputedStyle(probe).color), ground(document.body));
    if (found < 3) bad.push(['line', i, found]); }
  probe.remove();
  return {bad, seen};
})()"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here (Debian has it: apt-get install chromium)")
    browser = Chromium(program)
    yield browser
    browser.close()


def rows(first: int, last: int) -> str:
    found: list[dict[str, Any]] = []
    for n in range(first, last + 1):
        row = {
            "kind": "train",
            "step": n,
            "loss": 3 / math.sqrt(n),
            "lr": 1e-4,
            "grad_norm": 0.5,
            "elapsed_s": float(n),
        }
        parts = {"step_s": 1.0, "forward_s": 0.3, "backward_s": 0.5, "update_s": 0.1, "peak_gib": 11.5}
        found.append(row | parts | {"tokens_per_s": 4000.0, "supervised_tokens_per_s": 1000.0})
        if n % 20 == 0:
            found.append({"kind": "eval", "step": n, "heldout_loss": 3.1 / math.sqrt(n), "heldout_perplexity": 2.0})
        if n == 40:
            found.append({"kind": "start", "step": 41, "imports_s": 9.0})
    return "".join(json.dumps(row) + "\n" for row in found)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", metrics_jsonl=rows(1, STEPS))


@pytest.fixture(scope="module")
def address(run_folder: Path) -> str:
    return write_page(run_folder).as_uri()


@pytest.fixture
def page(chromium: Chromium, address: str) -> Iterator[Page]:
    opened = chromium.open(address)
    yield opened
    assert opened.errors == []
    assert opened.requests == [address]
    opened.close()


def box_of(page: Page, chart: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of a chart's area, scrolled into sight."""
    script = f"document.querySelector('#chart-{chart} .u-over')"
    page.evaluate(f"{script}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = page.evaluate(f"(b => [b.left, b.top, b.width, b.height])({script}.getBoundingClientRect())")
    return box[0], box[1], box[2], box[3]


def legend(page: Page, chart: str) -> str:
    return str(page.evaluate(f"document.querySelector('#chart-{chart} .legend').textContent"))


def limits(page: Page, chart: str) -> list[float]:
    found = page.evaluate(f"(x => [x.min, x.max])(document.querySelector('#chart-{chart}').chart.plot.scales.x)")
    return [float(value) for value in found]


def test_every_chart_is_drawn_with_named_axes(page: Page) -> None:
    found = page.evaluate(
        """[...document.querySelectorAll('.chart')].map(f => { const u = f.chart.plot, c = u.ctx.canvas;
          const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          const axes = u.axes.map(a => a.label), says = f.querySelector('.axes').textContent;
          return [f.dataset.chart, axes, pixels.some(v => v), says]; })"""
    )
    axes = {name: labels for name, labels, _, _ in found}
    assert axes["loss"] == ["step", "nats per supervised token"]
    assert axes["memory"] == ["step", "GiB"]
    assert len(axes) == 7
    for name, (step, unit), inked, caption in found:
        assert step == "step"
        assert inked, name
        assert caption == f"{unit}, over steps"


def test_the_cursor_tells_the_numbers_of_its_step_in_every_chart(page: Page) -> None:
    assert "last, step 80" in legend(page, "loss")
    left, top, width, height = box_of(page, "loss")
    step = 40
    page.mouse("mouseMoved", left + width * (step - 1) / (STEPS - 1), top + height / 2)
    page.wait("!document.querySelector('#chart-loss .at').textContent.includes('last')")
    told = legend(page, "loss")
    assert f"step {step} · resumed after step 40" in told
    assert f"held out {3.1 / math.sqrt(step):.4}" in told
    assert f"step {step}" in legend(page, "grad_norm")


def test_a_drag_zooms_all_charts_and_a_button_shows_all(page: Page) -> None:
    left, top, width, height = box_of(page, "loss")
    page.mouse("mouseMoved", left + width * 0.25, top + height / 2)
    page.mouse("mousePressed", left + width * 0.25, top + height / 2, button="left", buttons=1, clickCount=1)
    for share in (0.4, 0.5):
        page.mouse("mouseMoved", left + width * share, top + height / 2, button="left", buttons=1)
    page.mouse("mouseReleased", left + width * 0.5, top + height / 2, button="left", clickCount=1)
    page.wait("document.querySelector('#chart-loss').chart.zoomed()")
    for chart in ("loss", "speed"):
        low, high = limits(page, chart)
        assert low == pytest.approx(1 + 0.25 * (STEPS - 1), abs=1)
        assert high == pytest.approx(1 + 0.5 * (STEPS - 1), abs=1)
    page.evaluate("document.querySelector('#whole').click()")
    page.wait("!document.querySelector('#chart-loss').chart.zoomed()")
    assert limits(page, "speed") == [1, STEPS]


def test_smoothing_log_axis_and_lines_can_be_switched(page: Page) -> None:
    chart = "document.querySelector('#chart-loss').chart"
    smooth = "(e => { e.value = {}; e.dispatchEvent(new Event('input')); })(document.querySelector('#smoothing'))"
    page.evaluate(smooth.replace("{}", "0"))
    before = page.evaluate(f"{chart}.plot.series.length")
    page.evaluate(smooth.replace("{}", "3"))
    assert page.evaluate(f"{chart}.plot.series.length") == before + 1, "the logged line stays behind the smooth one"
    assert page.evaluate("document.querySelector('#smoothing-says').textContent") == "mean over 9 rows"
    assert page.evaluate("smoothed([1, 2, null, 6], 3)") == [1.5, 1.5, None, 6]
    page.evaluate("document.querySelector('#chart-loss .log').click()")
    assert page.evaluate(f"[{chart}.plot.scales.y.distr, {chart}.logButton.ariaPressed]") == [3, "true"]
    page.evaluate("document.querySelector('#chart-loss .legend button').click()")
    shown = page.evaluate(f"{chart}.plot.series.filter(s => s.label === 'training').some(s => s.show)")
    assert not shown
    assert page.evaluate("document.activeElement.textContent").startswith(" training")


def test_the_keyboard_reaches_everything_and_each_chart_can_be_walked(page: Page) -> None:
    page.evaluate("document.querySelector('#chart-loss .plot').focus()")
    page.key("ArrowLeft")
    assert f"step {STEPS - 1}: training" in page.evaluate("document.querySelector('#said').textContent")
    page.key("Home")
    assert "step 1: training 3" in page.evaluate("document.querySelector('#said').textContent")
    page.key("+")
    page.wait("document.querySelector('#chart-loss').chart.zoomed()")
    page.key("0")
    page.wait("!document.querySelector('#chart-loss').chart.zoomed()")
    page.key("l")
    assert page.evaluate("document.querySelector('#chart-loss').chart.log")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", ()))
        and node["role"]["value"] not in {"RootWebArea", "generic", "DisclosureTriangle"}
    ]
    assert len(focusable) > 30
    nameless = [n["role"]["value"] for n in focusable if not n.get("name", {}).get("value", "").strip()]
    assert nameless == []
    charts = [node for node in nodes if node["role"]["value"] == "application"]
    assert charts[0]["name"]["value"] == "Loss"
    assert "held out: from" in charts[0]["description"]["value"]
    assert "resumed after step 40" in charts[0]["description"]["value"]


def test_each_chart_is_a_table_too(page: Page) -> None:
    page.evaluate("document.querySelector('#chart-loss .numbers').open = true")
    page.wait("document.querySelector('#chart-loss .numbers table') !== null")
    table = page.evaluate(
        """(t => [t.caption.textContent, [...t.rows].map(r => [...r.cells].map(c => c.textContent)),
                 t.querySelectorAll('th[scope]').length])(document.querySelector('#chart-loss .numbers table'))"""
    )
    assert table[0] == "Loss, nats per supervised token"
    assert table[1][0] == ["step", "training", "held out"]
    assert table[1][20][0] == "20"
    assert table[1][20][2] == f"{3.1 / math.sqrt(20):.4}"
    assert table[2] == len(table[1]) + 2
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.caption)")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_their_ground(chromium: Chromium, address: str, dark: bool) -> None:
    """WCAG 2's contrast: 4.5 for text, 3 for lines; by the system's colours and by the page's switch."""
    page = chromium.open(address, dark=dark)
    ground = "getComputedStyle(document.body).backgroundColor"
    system = page.evaluate(ground)
    assert system == ("rgb(21, 24, 29)" if dark else "rgb(255, 255, 255)")
    found = page.evaluate(CONTRAST)
    assert found["seen"] > 150
    assert found["bad"] == []
    for name in ("dark", "light"):
        page.evaluate("document.querySelector('#theme').click()")
        assert page.evaluate("document.documentElement.dataset.theme") == name
        assert page.evaluate(CONTRAST)["bad"] == []
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.evaluate("document.querySelector('#theme').click()")
    assert page.evaluate(ground) == system
    assert page.errors == []
    page.close()


def test_a_phone_of_400_pixels_scrolls_one_way_only(chromium: Chromium, address: str, run_folder: Path) -> None:
    both = write_comparison([run_folder, run_folder], run_folder.parent / "both.html").as_uri()
    sweep = write_sweep_page(sweep_folder(run_folder.parent / "rates")).as_uri()
    for url in (address, both, sweep):
        page = chromium.open(url, width=400, height=800)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.evaluate("Math.max(...[...document.querySelectorAll('canvas')].map(c => c.clientWidth))") < 400
        assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
        assert page.errors == []
        page.close()


@pytest.mark.parametrize("dark", [False, True])
def test_a_sweeps_page_is_read_and_its_lines_say_who_they_are(chromium: Chromium, tmp_path: Path, dark: bool) -> None:
    address = write_sweep_page(sweep_folder(tmp_path / "rates")).as_uri()
    page = chromium.open(address, dark=dark)
    assert page.evaluate(CONTRAST)["bad"] == []
    best = "document.querySelector('.parallel .best')"
    assert page.evaluate(f"{best}.querySelector('title').textContent").startswith(
        "lr_0.003_r_8: optim.lr 0.003; lora.r 8"
    )
    order = "[...document.querySelectorAll('.parallel .candidate')].at(-1) === " + best
    assert page.evaluate(order)  # above the others
    assert page.evaluate("document.querySelectorAll('.parallel .axis .name').length") == 3
    assert page.evaluate("document.querySelectorAll('.charts .chart').length") >= 1
    assert page.errors == []
    assert page.requests == [address]
    page.close()


def test_a_script_in_a_row_is_text(chromium: Chromium, address: str) -> None:
    page = chromium.open(address)
    assert page.evaluate("document.querySelectorAll('img, .answer script').length") == 0
    assert "alert(1)" in page.evaluate("document.querySelector('.answer').textContent")
    assert page.evaluate("document.querySelectorAll('script').length") == 4
    assert page.errors == []
    # and were one to stand in the page, its policy would not let it run
    made = "Object.assign(document.createElement('script'), {textContent: 'window.ran = true'})"
    page.evaluate(f"document.body.append({made})")
    assert page.evaluate("window.ran === undefined")
    assert "Content Security Policy" in page.errors[0]
    page.close()


def test_a_board_follows_a_run_while_it_trains(chromium: Chromium, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "live", metrics_jsonl=rows(1, 10))
    (run / "exit.json").unlink()
    (run / "heartbeat.json").write_text(json.dumps({"pid": 1, "host": "elsewhere", "time": 4e9, "step": 10}))
    with open_board(tmp_path / "runs", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        page = chromium.open(f"{base}/run?run=live")
        assert page.evaluate("document.querySelector('.state').textContent") == "running"
        assert page.evaluate("document.title").startswith("running: ")
        assert "step 10 of 20" in page.evaluate("document.querySelector('.headline').textContent")
        page.evaluate("document.querySelector('#chart-loss .numbers').open = true")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(rows(11, 20))
        (run / "exit.json").write_text('{"code": 0, "state": "finished", "time": 5e9}')
        page.wait("document.querySelector('.state').textContent === 'finished'")
        page.wait("document.querySelector('#chart-loss').chart.plot.data[0].at(-1) === 20")
        assert limits(page, "loss") == [1, 20]
        assert page.evaluate("document.querySelector('#chart-loss .numbers table').rows.length") == 21
        assert page.errors == []
        assert {address.partition("?")[0] for address in page.requests} == {f"{base}/run", f"{base}/news/run"}
        page.close()
        board = chromium.open(f"{base}/")
        board.evaluate("document.querySelector('input[type=checkbox]').click()")
        write_run(tmp_path / "runs" / "second", lr=3e-4)
        board.wait("document.querySelectorAll('.runs tbody tr').length === 2")
        assert board.evaluate("[...document.querySelectorAll('input:checked')].map(i => i.value)") == ["live"]
        assert board.errors == []
        board.close()
        server.shutdown()

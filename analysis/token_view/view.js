// The token view: rows of coloured tokens, a table for the one in focus, and the controls.
(async () => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { methods, metrics, texts, pieces, orders, scores, bases } = data;
  const numbers = await unpack(data);
  const own = methods.filter((_, at) => !bases[at]); // under the model itself, not under its later checkpoint
  const distinct = own.map((_, at) => at).filter((at) => !orders[at].alike); // methods whose labels do not all tie
  const [left, second = -1] = distinct.length > 1 ? distinct : [...own.keys()];
  const right = own.length < methods.length ? left + own.length : second; // beside it, its target after training
  const shown = { metric: metrics[0], left, right, order: "" };
  const special = new Set(data.special);
  const rows = [];      // per text: { section, title, panes: [{ heading, text, spans }] }
  const place = [];     // per supervised token: [text, index among the tokens of the text]
  let pinned = -1, current = -1, pointed = -1, hits = [], hit = -1;

  // ---- data -------------------------------------------------------------------------------------------------------
  const of = (metric, method) => numbers[metric.method ? `${metric.key} ${method}` : metric.key];
  const panel = panelOf(data, numbers, shown, of);
  const lists = listsOf(data, numbers, shown, of, rows, place);

  // ---- rows -------------------------------------------------------------------------------------------------------
  function build() {
    let start = 0;
    texts.forEach((text, at) => {
      const section = el("section", "row");
      const title = section.appendChild(el("h2", "", `Row ${text.row} `));
      title.append(el("small"));
      const panes = section.appendChild(el("div", "panes"));
      rows.push({ section, title, panes: [pane(panes, at, start)], box: panes, start });
      start += text.length;
    });
  }
  const blank = el("span", "t");
  blank.tabIndex = -1;
  blank.setAttribute("role", "button");
  blank.setAttribute("aria-pressed", "false");
  function pane(box, at, start) {
    const made = box.appendChild(el("div", "pane"));
    const heading = made.appendChild(el("h3")), text = made.appendChild(el("div", "text"));
    text.setAttribute("role", "group");
    const spans = [];
    for (let index = 0; index < texts[at].length; index++) {
      const n = numbers.slots[start + index], span = n < 0 ? el("span", "c") : blank.cloneNode();
      if (special.has(numbers.tokens[start + index])) span.classList.add("special");
      write(span, pieces[numbers.tokens[start + index]]);
      const whole = data.completes[start + index];
      if (whole !== undefined) span.append(whole);
      if (n >= 0) {
        span.dataset.n = n;
        spans.push(span);
        place[n] = [at, index];
      }
      text.append(span);
    }
    return { made, heading, text, spans, seen: [] };
  }
  function beside({ box, panes: [{ made, seen }] }) {
    const copy = box.appendChild(made.cloneNode(true)), [heading, text] = copy.children;
    for (const span of copy.querySelectorAll('[tabindex="0"]')) span.tabIndex = -1;
    return { made: copy, heading, text, spans: [...text.querySelectorAll(".t")], seen: [...seen] };
  }
  const spanOf = (n, side = 0) => {
    const row = rows[place[n][0]];
    const panes = row.panes[side] ?? row.panes[0];
    return panes.spans[n - Number(panes.spans[0].dataset.n)];
  };

  function paint() {
    const two = shown.metric.method && shown.right >= 0;
    rows.forEach((row, at) => {
      if (two && !row.panes[1]) row.panes[1] = beside(row);
      row.panes.forEach((pane, side) => {
        const method = side ? shown.right : shown.left;
        pane.made.hidden = side === 1 && !two;
        if (pane.made.hidden) return;
        pane.heading.textContent = shown.metric.method ? methods[method] : shown.metric.name;
        pane.text.setAttribute("aria-label", `Row ${texts[at].row}, ${pane.heading.textContent}`);
        colour(pane, method);
      });
      row.title.lastChild.textContent = describe(at);
    });
    if (stop?.closest(".pane").hidden) reach(spanOf(Number(stop.dataset.n)));
    legend(two);
    lists.paint();
    if (current >= 0) detail(current);
  }
  function colour({ spans, seen }, method) {
    const values = of(shown.metric, method), first = Number(spans[0].dataset.n), { high, log } = shown.metric;
    const ranks = numbers[bases[method] && shown.metric.method ? "label_rank after" : "label_rank"];
    const masses = [method, ...(shown.metric.method || shown.right < 0 ? [] : [shown.right])].map((side) => numbers[`negative_mass ${side}`]);
    spans.forEach((span, at) => {
      const x = values[first + at], none = Number.isNaN(x), off = masses.some((mass) => mass[first + at] > 0);
      const part = log ? Math.log(Math.max(x, 1)) / Math.log(high) : Math.abs(x) / high, miss = ranks[first + at] > 1;
      const size = none ? 0 : Math.round(1000 * Math.min(1, part)) / 1000, marks = (x < 0) + 2 * none + 4 * off + 8 * miss;
      const [oldSize, oldMarks] = seen[at] ?? [0, 0];
      if (size !== oldSize) span.style.setProperty("--v", size);
      if (marks !== oldMarks) {
        span.classList.toggle("below", x < 0);
        span.classList.toggle("none", none);
        span.classList.toggle("off", off);
        span.classList.toggle("miss", miss);
      }
      seen[at] = [size, marks];
    });
  }
  function describe(at) {
    const { count, length, columns } = texts[at], first = Number(rows[at].panes[0].spans[0].dataset.n);
    const hits = numbers.label_rank.subarray(first, first + count).filter((rank) => rank === 1).length;
    const parts = [`${count} of ${length} tokens trained on`, `label most probable: ${Math.round(100 * hits / count)} %`, ...columns];
    const sides = [shown.left, shown.right].filter((side) => (scores[methods[side]]?.[at] ?? null) !== null);
    const weights = sides.map((side) => `${methods[side]} ${number(scores[methods[side]][at])}`);
    if (weights.length) parts.push(`label weight: ${weights.join(", ")}`);
    parts.push(`negative margin ${number(scores.negative_margin[at] ?? NaN)}`);
    const order = orders.find((each) => each.by === shown.order);
    if (order) parts.unshift(order.ranks[at] === null ? "not ranked" : `rank ${order.ranks[at]} of ${data.ranked}`);
    return parts.join(" · ");
  }
  function legend(two) {
    const { metric } = shown, box = $("legend");
    const scale = el("div", "scale", "", el("div", `ramp ${metric.signed ? "two" : "one"}`));
    const middle = metric.log ? Math.sqrt(metric.high) : metric.high / 2;
    const ends = metric.signed ? [-metric.high, 0, metric.high] : [metric.log ? 1 : 0, middle, metric.high];
    const tick = (x) => String(Number(x.toPrecision(3))).replace("-", "−");
    ends.forEach((x, at) => scale.append(el("span", "", (at === 2 ? "≥ " : at === 0 && metric.signed ? "≤ " : "") + tick(x))));
    const sample = (kind, text) => el("span", "", "", el("span", `t ${kind}`, "token"), ` ${text}`);
    const samples = [];
    if (metric.signed) {
      samples.push(sample("below", "below zero"));
      samples[0].firstChild.style.setProperty("--v", 0.6);
    }
    if (["kl", "entropy"].includes(metric.key)) samples.push(sample("none", "not defined: Q has negative mass"));
    if (metric.key === "label_weight") samples.push(sample("none", "not defined: p(label) is 1"));
    samples.push(sample("miss", "another token is more probable than the label"));
    samples.push(sample("off", "Q has negative entries"), el("span", "", "", el("span", "c", "token"), " context, not trained on"));
    if (special.size) samples.push(el("span", "", "", el("span", "c special", "token"), " special token"));
    const says = el("div", "says", `${metric.name}: ${metric.says}${two || metric.method || metric.key === "supervised" ? "" : "; the same for every method"}.`);
    box.replaceChildren(says, ...(metric.key === "supervised" ? [] : [scale]), ...samples);
  }
  // ---- the token in focus -------------------------------------------------------------------------------------------
  function detail(n) {
    current = n;
    const [at, index] = place[n];
    $("detail").replaceChildren(...panel.supervised(n, at, index, rows[at].start, n === pinned));
  }
  function context(at, index) {
    if (current >= 0) twins(current, false);
    current = -1;
    $("detail").replaceChildren(...panel.context(at, index, rows[at].start));
  }
  function twins(n, on) {
    for (const pane of rows[place[n][0]].panes) pane.spans[n - Number(pane.spans[0].dataset.n)].classList.toggle("twin", on);
  }
  function show(n) {
    if (current >= 0) twins(current, false);
    twins(n, true);
    $("detail").classList.add("filled");
    detail(n);
  }
  function pin(n) {
    const change = (m, on) => rows[place[m][0]].panes.forEach((pane) => {
      const span = pane.spans[m - Number(pane.spans[0].dataset.n)];
      span.classList.toggle("pinned", on);
      span.setAttribute("aria-pressed", String(on));
    });
    const again = n === pinned;
    if (pinned >= 0) change(pinned, false);
    pinned = again ? -1 : n;
    if (pinned >= 0) change(pinned, true);
    if (n >= 0) show(n);
  }

  // ---- moving about -------------------------------------------------------------------------------------------------
  let stop = null; // the token in the tab order
  function reach(span) {
    if (stop) stop.tabIndex = -1;
    stop = span;
    stop.tabIndex = 0;
  }
  function focus(span) {
    if (!span) return;
    reach(span);
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
    const gap = span.getBoundingClientRect().bottom - ($("detail").getBoundingClientRect().top - 8);
    if (getComputedStyle($("detail")).position === "fixed" && gap > 0) scrollBy(0, gap); // not behind the sheet
  }
  const sideOf = (span) => rows[place[Number(span.dataset.n)][0]].panes.findIndex((pane) => pane.spans.includes(span));
  const sequence = () => [...$("rows").children].flatMap((section) => rows.find((row) => row.section === section).panes[0].spans.map((span) => Number(span.dataset.n)));
  function step(span, key) {
    const n = Number(span.dataset.n), side = sideOf(span), order = sequence(), at = order.indexOf(n), go = (m) => order[m] === undefined ? null : spanOf(order[m], side);
    const own = rows[place[n][0]].panes[0].spans.map((each) => Number(each.dataset.n));
    const sections = [...$("rows").children], here = sections.indexOf(rows[place[n][0]].section);
    const rowAt = (next) => { const row = rows.find((each) => each.section === sections[next]); return row && (row.panes[side] ?? row.panes[0]).spans[0]; };
    if (key === "ArrowRight") return go(at + 1);
    if (key === "ArrowLeft") return go(at - 1);
    if (key === "Home") return spanOf(own[0], side);
    if (key === "End") return spanOf(own.at(-1), side);
    if (key === "PageDown") return rowAt(here + 1);
    if (key === "PageUp") return rowAt(here - 1);
    const way = key === "ArrowDown" ? 1 : -1, from = span.getBoundingClientRect();
    let best = null, distance = Infinity, top = null;
    for (let m = at + way; order[m] !== undefined; m += way) {
      const box = spanOf(order[m], side).getClientRects()[0];
      if (!box || Math.abs(box.top - from.top) < 4) continue;
      top ??= box.top;
      if (Math.abs(box.top - top) > 4) break; // a line further
      const gap = Math.abs(box.left - from.left);
      if (gap < distance) [best, distance] = [spanOf(order[m], side), gap];
    }
    return best;
  }
  const tokenOf = (event) => event.target.closest?.(".t[data-n]");
  function contextOf(event) {
    const span = event.target.closest?.(".c");
    if (!span) return;
    const at = rows.findIndex((row) => row.section.contains(span));
    context(at, [...span.parentElement.children].indexOf(span));
  }
  // On a touch screen a token is shown on click only: a sheet that grows earlier would catch the rest of the tap.
  for (const kind of ["pointerover", "focusin"]) $("rows").addEventListener(kind, (event) => {
    const span = tokenOf(event);
    if (pinned < 0 && event.pointerType === "mouse") contextOf(event);
    if (!span || !(event.pointerType === "mouse" || span.matches(":focus-visible"))) return;
    pointed = Number(span.dataset.n);
    if (pinned < 0) show(pointed);
  });
  $("rows").addEventListener("click", (event) => { const span = tokenOf(event); if (span) { pin(Number(span.dataset.n)); focus(span); } else if (pinned < 0) contextOf(event); });
  document.addEventListener("keydown", (event) => {
    const span = tokenOf(event), typing = event.target.matches?.("input, select");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      if (event.target === $("find")) focus(stop);
      else if (pinned >= 0) { pin(pinned); if (pointed >= 0) show(pointed); }
      return;
    }
    if (event.key === "/" && !typing) { event.preventDefault(); $("find").focus(); return; }
    if (event.target === $("find") && event.key === "Enter") { event.preventDefault(); seek(event.shiftKey ? -1 : 1); return; }
    if (!span) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(Number(span.dataset.n)); }
    if (/^(Arrow|Home|End|Page)/.test(event.key)) { event.preventDefault(); focus(step(span, event.key)); }
  });
  $("least").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) { const n = Number(button.dataset.go); if (pinned !== n) pin(n); focus(spanOf(n)); }
  });

  // ---- finding ------------------------------------------------------------------------------------------------------
  function find() {
    for (const span of document.querySelectorAll(".t.hit, .c.hit")) span.classList.remove("hit");
    const wanted = $("find").value.toLowerCase();
    hits = [];
    hit = -1;
    if (wanted) for (const section of $("rows").children) { // in the order shown
      const row = rows.find((each) => each.section === section), at = rows.indexOf(row), ends = [];
      let text = "";
      for (let index = 0; index < texts[at].length; index++) {
        text += data.completes[row.start + index] ?? pieces[numbers.tokens[row.start + index]].replace(/[\udc80-\udcff]/g, "");
        ends.push(text.length);
      }
      const low = text.toLowerCase();
      for (let from = low.indexOf(wanted); from >= 0; from = low.indexOf(wanted, from + 1)) {
        const first = ends.findIndex((end) => end > from), last = ends.findIndex((end) => end >= from + wanted.length);
        hits.push([at, first, last]);
        for (const pane of row.panes) for (let index = first; index <= last; index++) pane.text.children[index].classList.add("hit");
      }
    }
    if (hits.length) seek(1, false);
    else $("hits").textContent = wanted ? "none" : "";
  }
  function seek(way, moves = true) {
    if (!hits.length) return;
    hit = (hit + way + hits.length) % hits.length;
    $("hits").textContent = `${hit + 1} of ${hits.length}`;
    const [at, first] = hits[hit], span = rows[at].panes[0].text.children[first];
    span.scrollIntoView({ block: "center" });
    const n = numbers.slots[rows[at].start + first];
    if (n >= 0 && pinned < 0) show(n);
    if (moves && n >= 0) reach(span);
  }

  // ---- controls -----------------------------------------------------------------------------------------------------
  function controls() {
    metrics.forEach((metric, at) => $("metric").add(new Option(metric.name, at)));
    methods.forEach((method, at) => { $("left").add(new Option(method, at)); $("right").add(new Option(method, at)); });
    $("right").add(new Option("nothing", -1));
    $("order").add(new Option("as given", ""));
    orders.filter((order) => !order.alike).forEach((order) => $("order").add(new Option(order.by === "negative_margin" ? "largest negative margin" : `smallest label weight: ${order.by}`, order.by)));
    $("left").value = shown.left;
    $("right").value = shown.right;
    $("order").value = shown.order;
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("metric").addEventListener("change", (event) => { shown.metric = metrics[event.target.value]; paint(); });
    for (const side of ["left", "right"]) $(side).addEventListener("change", (event) => { shown[side] = Number(event.target.value); paint(); refind(); });
    $("order").addEventListener("change", (event) => { shown.order = event.target.value; sort(); paint(); refind(); });
    $("find").addEventListener("input", find);
    $("next").addEventListener("click", () => seek(1));
    $("previous").addEventListener("click", () => seek(-1));
    const themes = ["auto", "light", "dark"];
    $("theme").addEventListener("click", () => {
      const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3];
      if (next === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = next;
      $("theme").textContent = `theme: ${next}`;
    });
  }
  const refind = () => { if ($("find").value) find(); };
  function sort() {
    const order = orders.find((each) => each.by === shown.order);
    const ranks = rows.map((_, at) => (order ? order.ranks[at] ?? Infinity : at));
    const sorted = rows.map((_, at) => at).sort((a, b) => (ranks[a] === ranks[b] ? a - b : ranks[a] - ranks[b]));
    $("rows").append(...sorted.map((at) => rows[at].section));
  }

  build();
  controls();
  sort();
  paint();
  for (const note of data.notes) $("notes").append(el("li", "", note));
  reach(rows[0].panes[0].spans[0]);
  detail(0);
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
})();

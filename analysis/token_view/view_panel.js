"use strict";
// The panel of the token in focus: its candidates and its metrics.

function panelOf(data, numbers, shown, of) {
  const { methods, metrics, texts, pieces, bases } = data;
  function supervised(n, at, index, first, pinned) {
    const sides = [...new Set([shown.left, shown.right])].filter((side) => side >= 0);
    return [...head(at, index, first, pinned ? ["pinned (Escape unpins)"] : []), candidates(n, sides), figures(n, sides)];
  }
  function context(at, index, first) {
    const why = index ? "context: not trained on" : "the first token of a text has no prediction";
    return head(at, index, first, [why]);
  }
  function head(at, index, first, remarks) {
    const whole = data.completes[first + index];
    const where = [`row ${texts[at].row}, token ${index + 1} of ${texts[at].length}`, `id ${data.entries[numbers.tokens[first + index]]}`];
    if (whole !== undefined) where.push(`completes ${whole}`);
    const title = el("h2", "", "", write(el("span", "token"), pieces[numbers.tokens[first + index]], false));
    return [title, el("p", "where", [...where, ...remarks].join(" · "))];
  }
  function candidates(n, sides) {
    const K = data.candidates, teacher = numbers.teacher !== undefined, after = bases.includes(1), table = el("table");
    table.append(el("caption", "", "Student p, target Q and their difference"));
    const models = ["p", ...(after ? ["p after"] : []), ...(teacher ? ["teacher"] : [])];
    const names = el("tr", "", "", el("th"), ...models.map(() => el("th")));
    const head = el("tr", "", "", el("th", "", "token"), ...models.map((name) => el("th", "", name)));
    const base = (side) => (bases[side] ? "p after" : "p");
    for (const side of sides) {
      const over = el("th", "", methods[side]);
      over.colSpan = 2;
      over.title = methods[side];
      names.append(over);
      head.append(el("th", "", "Q"), el("th", "", "Q − p"));
    }
    for (const row of [names, head]) for (const each of row.children) each.scope = "col";
    table.append(el("thead", "", "", names, head));
    const body = table.appendChild(el("tbody"));
    const order = [...Array(K).keys()].map((k) => n * K + k);
    const label = order.find((k) => numbers.ids[k] === numbers.labels[n]);
    const most = Math.max(...sides.flatMap((side) => order.map((k) => Math.abs(numbers[`move ${side}`][k]) || 0)), 1e-9);
    for (const k of [label, ...order.filter((k) => k !== label)]) {
      const first = el("td", "", "", write(el("span", "token"), pieces[numbers.ids[k]], false));
      if (k === label) first.append(el("span", "tag", " label"));
      const moves = sides.map((side) => [numbers[base(side)][k], numbers[`move ${side}`][k]]);
      body.append(line(k === label ? "label" : "", first, models.map((name) => numbers[name][k]), moves, most));
    }
    const others = sides.map((side) => [numbers[`rest ${base(side)}`][n], numbers[`rest ${side}`][n]]);
    const total = sides.map((side) => numbers[`total ${side}`][n] - 1).map((x) => [1, Math.abs(x) < 2e-4 ? 0 : x]); // to four digits
    body.append(line("rest", cell("all others"), models.map((name) => numbers[`rest ${name}`][n]), others, most));
    body.append(line("sum", cell("sum"), models.map(() => 1), total, most));
    const scroll = el("div", "wide", "", table);
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Candidates");
    return scroll;
  }
  function line(kind, first, probabilities, moves, most) {
    const row = el("tr", kind, "", first, ...probabilities.map((p) => cell(number(p))));
    for (const [p, move] of moves) {
      const q = p + move, near = Math.abs(q) < 1e-7 ? 0 : q;
      row.append(cell(number(near), near < 0 ? "minus" : ""));
      const moved = cell(number(move, true), `move ${move < 0 ? "down" : "up"}`);
      moved.style.setProperty("--v", Math.min(1, Math.abs(move) / most) || 0);
      row.append(moved);
    }
    return row;
  }
  function figures(n, sides) {
    const table = el("table", "", "", el("caption", "", "Metrics of this token"));
    table.append(el("thead", "", "", el("tr", "", "", el("th"), ...sides.map((side) => el("th", "", methods[side])))));
    const body = table.appendChild(el("tbody"));
    for (const metric of metrics) {
      const first = cell(metric.name);
      first.title = metric.says;
      if (metric.key === "supervised") continue;
      const values = metric.method ? sides.map((side) => of(metric, side)[n]) : [of(metric, 0)[n]];
      const cells = values.map((x) => cell(metric.log ? String(x) : number(x), metric.key === "negative_mass" && x > 0 ? "minus" : ""));
      if (!metric.method) cells[0].colSpan = sides.length;
      body.append(el("tr", "", "", first, ...cells));
    }
    return el("div", "wide", "", table);
  }
  return { supervised, context };
}

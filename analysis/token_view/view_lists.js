"use strict";
// The lists above the rows: tokens with the smallest Q(label), entries that methods promote and demote, means over segments.

function listsOf(data, numbers, shown, of, rows, place) {
  const { methods, metrics, texts, pieces, orders, bases } = data;
  const byId = (id) => document.getElementById(id);
  const heads = (...names) => el("thead", "", "", el("tr", "", "", ...names.map((name) => { const th = el("th", "", name); th.scope = "col"; th.title = name; return th; })));
  function paint() {
    least();
    vocabulary();
    segments();
  }

  function least() {
    const by = shown.order || methods[shown.left], order = orders.find((each) => each.by === by);
    const list = !order || order.alike ? [] : order.tokens;
    byId("least").hidden = !order;
    if (!order) return;
    const what = by === "negative_margin" ? "tokens with the largest negative margin" : `tokens with the smallest Q(label) under ${by}`;
    byId("least").firstElementChild.textContent = order.alike ? `${by}: all labels tie` : `The ${list.length} ${what}`;
    byId("least").lastElementChild.replaceChildren(...list.map((n) => {
      const [at, index] = place[n], button = el("button");
      button.type = "button";
      button.dataset.go = n;
      button.append(el("span", "where", `row ${texts[at].row}: `));
      const start = rows[at].start + index;
      for (let t = Math.max(rows[at].start, start - 6); t < start; t++) write(button, pieces[numbers.tokens[t]], false);
      button.append(write(el("b"), pieces[numbers.tokens[start]], false));
      const score = by === "negative_margin" ? `negative margin ${number(numbers.negative_margin[n])}` : `Q ${number(numbers[`q_y ${methods.indexOf(by)}`][n])}`;
      button.append(el("span", "where", `  p ${number(numbers.p_y[n])}, ${score}`));
      return el("li", "", "", button);
    }));
  }

  function vocabulary() {
    const { totals } = data, box = byId("vocabulary");
    box.hidden = !totals;
    if (!totals) return;
    const own = methods.filter((_, at) => !bases[at]).length, side = shown.left % own, method = methods[side];
    const beside = shown.right >= 0 && shown.right % own !== side ? shown.right % own : -1;
    box.firstElementChild.textContent = `Vocabulary: what ${method} promotes and demotes, over ${totals.tokens} tokens`;
    const table = (ids, title) => {
      const listed = el("table", "", "", el("caption", "", title), heads("token", "labels", "sum of p", "sum of Q", "Q − p", "as label", "elsewhere", ...(beside < 0 ? [] : [`Q − p, ${methods[beside]}`])));
      const body = listed.appendChild(el("tbody"));
      const most = Math.max(...ids.map((k) => Math.abs(totals.moves[side][k])), 1e-9);
      for (const k of ids) {
        const move = totals.moves[side][k], own = totals.label_moves[side][k];
        const moved = cell(number(move, true), `move ${move < 0 ? "down" : "up"}`);
        moved.style.setProperty("--v", Math.abs(move) / most);
        const token = el("td", "", "", write(el("span", "token"), pieces[totals.pieces[k]], false));
        body.append(el("tr", "", "", token, cell(String(totals.labels[k])), cell(number(totals.p[k])), cell(number(totals.p[k] + move)), moved, cell(number(own, true)), cell(number(move - own, true)), ...(beside < 0 ? [] : [cell(number(totals.moves[beside][k], true))])));
      }
      return el("div", "wide", "", listed);
    };
    box.lastElementChild.replaceChildren(
      el("p", "says", "Sums over all tokens read: labels is how often an entry is the label, the sums of p and of Q how often student and target expect it; Q − p is split into the tokens with that label and the others."),
      el("div", "pair", "", table(totals.promoted[side], "Most promoted"), table(totals.demoted[side], "Most demoted")));
  }

  function segments() {
    const names = data.segments, box = byId("segments"), { metric } = shown;
    box.hidden = names.length < 2;
    if (box.hidden) return;
    const metricsShown = metric.key === "supervised" ? metrics.filter((each) => ["label_weight", "nll"].includes(each.key)) : [metric];
    const sides = [...new Set([shown.left, shown.right])].filter((side) => side >= 0);
    const columns = metricsShown.flatMap((each) => (each.method ? sides.map((side) => [each, side]) : [[each, 0]]));
    const mean = (values, at) => {
      let sum = 0, count = 0;
      numbers.segment.forEach((segment, n) => { if (segment === at && !Number.isNaN(values[n])) { sum += values[n]; count += 1; } });
      return count ? sum / count : NaN;
    };
    const title = (each, side) => (each.method ? `${each.name}, ${methods[side]}` : each.name);
    box.firstElementChild.textContent = `Segments: means over ${names.join(", ")}`;
    const table = el("table", "", "", heads("segment", "tokens", ...columns.map((each) => title(...each))));
    const body = table.appendChild(el("tbody"));
    names.forEach((name, at) => {
      const count = numbers.segment.filter((segment) => segment === at).length;
      body.append(el("tr", "", "", cell(name), cell(String(count)), ...columns.map(([each, side]) => cell(number(mean(of(each, side), at))))));
    });
    box.lastElementChild.replaceChildren(el("div", "wide", "", table));
  }
  return { paint };
}

// The KL explorer: a token strip coloured by KL and, for its chosen token, the distributions behind the number. It stands behind strip.js in one
// module and uses what is defined there. All text is set as textContent.

const WAYS = { forward: { name: "D(teacher‖student)", part: "p·log(p/q)" }, reverse: { name: "D(student‖teacher)", part: "q·log(q/p)" } };
const NUMBERS = ["forward", "reverse", "log_p", "log_q", "rest_p", "rest_q", "rest_forward", "rest_reverse"];
const LONGEST = 20;      // tokens in the list of the largest
// Nats at which the colours of the strip begin: the same for every transcript, student and temperature, so that two views can be compared.
const NATS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10];

// Plain numbers for the eye: infinities as ∞, a real minus.
function amount(x, digits = 3) {
  if (x === Infinity || x === -Infinity) return x > 0 ? "∞" : "−∞";
  return figure(x, digits).replaceAll("-", "−");
}
// The same number of decimals down a column, powers of ten below them.
function decimal(x, digits = 4) {
  if (!Number.isFinite(x) || x === 0 || Math.abs(x) < 10 ** -digits) return amount(x);
  return x.toFixed(digits).replaceAll("-", "−");
}
const counted = (n) => n.toLocaleString("en");

function readDivergence(model) {
  const given = model.get("divergence");
  const d = { temperature: given.temperature, names: given.names, vocabulary: given.vocabulary, ids: array(Int32Array, given.ids) };
  for (const name of NUMBERS) d[name] = array(Float64Array, given[name]);
  d.n = d.rest_p.length;
  d.k = d.n ? d.ids.length / d.n : 0;
  d.words = new Map(given.word_ids.map((id, i) => [id, { text: given.words[i], kind: given.word_kinds[i] }]));
  return d;
}

function readLayers(model) {
  const given = model.get("layers");
  return { blocks: given.blocks, cosine: array(Float32Array, given.cosine), distance: array(Float32Array, given.distance) };
}

// The kinds of tokens that there are, by name, and of which each token is; no names where that is not known.
function readKinds(model) {
  const given = model.get("kinds") || {};
  return { names: given.names || [], values: array(Uint8Array, given.values) };
}
// Whether token i is of the kind that is chosen; `only` is empty for all.
const isKind = ({ kinds, only }, i) => !only || kinds.names[kinds.values[i]] === only;
// Whether token i is coloured, listed and counted: of the kind that is chosen, and a target unless all tokens are asked for.
const isShown = (now, i) => (now.all || now.mask[i] === 1) && isKind(now, i);

// p·log(p/q) from logarithms, in nats. Where p is 0 it is 0; where only q is, infinite.
function contribution(log_p, log_q) {
  const p = Math.exp(log_p);
  return p > 0 ? p * (log_p - log_q) : 0;
}

// The distribution that predicts token i: a row a kept candidate, likeliest for the teacher first, and one for all others. A row holds p and, by
// student, q and its part of the KL; the parts of all rows add up to the KL at the token.
function candidateRows(d, i, way) {
  const rows = [];
  for (let j = 0; j < d.k; j++) {
    const log_p = d.log_p[i * d.k + j], log_q = d.names.map((_, s) => d.log_q[(s * d.n + i) * d.k + j]);
    rows.push({ id: d.ids[i * d.k + j], p: Math.exp(log_p), q: log_q.map(Math.exp),
      part: log_q.map((q) => way === "forward" ? contribution(log_p, q) : contribution(q, log_p)) });
  }
  rows.sort((a, b) => b.p - a.p);
  const others = (values) => d.names.map((_, s) => values[s * d.n + i]);
  rows.push({ id: -1, p: d.rest_p[i], q: others(d.rest_q), part: others(d[`rest_${way}`]) });
  return rows;
}

// Mean over the shown targets of the mask. Token 0 is predicted by nothing, so it is no target.
function meanOver(now, s) {
  const { d, way, mask } = now;
  let total = 0, n = 0;
  for (let i = 1; i < d.n; i++) if (mask[i] && isKind(now, i)) { total += d[way][s * d.n + i]; n++; }
  return { mean: n ? total / n : 0, n };
}

// Sums of KL by role or by part of a turn, in the order of the text; sums and shares are by student.
function sharesOf(now, by) {
  const { d, tokens, mask, way } = now;
  const groups = new Map(), total = d.names.map(() => 0);
  for (let i = 1; i < d.n; i++) {
    if (!isShown(now, i)) continue;
    const key = by === "role" ? roleAt(tokens, i) : tokens.names[tokens.segments[i]];
    if (!groups.has(key)) groups.set(key, { key, tokens: 0, inMask: 0, sums: d.names.map(() => 0) });
    const group = groups.get(key);
    group.tokens++;
    group.inMask += mask[i];
    d.names.forEach((_, s) => { const x = d[way][s * d.n + i]; group.sums[s] += x; total[s] += x; });
  }
  return [...groups.values()].map((g) => ({ ...g, shares: g.sums.map((x, s) => total[s] > 0 ? x / total[s] : 0) }));
}

function roleAt(tokens, i) { return (tokens.owners[i] >= 0 && tokens.roles[tokens.owners[i]]) || "template"; }

// The tokens with the largest KL, largest first.
function largestOf(now) {
  const { d, way, student } = now;
  const value = (i) => d[way][student * d.n + i], found = [];
  for (let i = 1; i < d.n; i++) if (isShown(now, i)) found.push(i);
  return found.sort((a, b) => value(b) - value(a) || a - b).slice(0, LONGEST);
}

// Parts of the page

function word(text, kind = 0) { return node("bdi", { class: `kl-word${KINDS[kind]}` }, text.replaceAll("\n", "")); }

function wordAt(tokens, i) { return word(tokens.texts[tokens.ids[i]], tokens.kinds[tokens.ids[i]]); }

// A number, exact in data-value; with a `share`, over a bar of that length, of another colour below 0.
function numeral(tag, x, text, share = null) {
  const made = node(tag, { class: "kl-number", "data-value": String(x) }, text);
  if (share === null) return made;
  const bar = node("span", { class: `kl-bar${share < 0 ? " minus" : ""}`, "aria-hidden": "true" });
  bar.style.width = `${100 * Math.min(1, Math.abs(share) || 0)}%`;
  made.prepend(bar);
  return made;
}
const cell = (x, text, share = null) => numeral("td", x, text, share);
const scrolling = (label) => node("div", { class: "kl-scroll", role: "region", "aria-label": label, tabindex: 0 });
const rowHead = (...content) => node("th", { scope: "row" }, ...content);

function tableOf(heads, rows, foot = []) {
  const lines = (some) => some.map((cells) => node("tr", {}, ...cells));
  return node("table", {}, node("thead", {}, node("tr", {}, ...heads.map((text) => node("th", { scope: "col" }, text)))),
    node("tbody", {}, ...lines(rows)), node("tfoot", {}, ...lines(foot)));
}

function section(name, title, ...content) {
  const head = node("h2", {}, title);
  return { head, root: node("section", { class: `kl-panel kl-${name}` }, head, ...content) };
}

const choiceOf = (label, options, act) => node("select", { "aria-label": label, onchange: (e) => act(e.target.value) },
  ...options.map(([value, text]) => node("option", { value }, text)));

// What stands behind the KL of the chosen token.
function createDetail() {
  const about = node("div", { role: "status" }), scroll = scrolling("distributions at the chosen token");
  const part = section("detail", "Chosen token", about, scroll);

  function update({ d, tokens, way, selected: i }) {
    scroll.replaceChildren();
    if (!(i >= 0 && i < d.n)) return about.replaceChildren("Choose a token in the strip, in the list or in a map.");
    const where = i ? `, predicted at position ${i - 1}; T = ${amount(d.temperature)}.` : " is predicted by nothing.";
    about.replaceChildren(`Token ${i} `, wordAt(tokens, i), where);
    if (i) scroll.append(distribution(d, tokens.numbers[i], i, way));
  }

  function distribution(d, actual, i, way) {
    const rows = candidateRows(d, i, way), sum = (f) => rows.reduce((x, row) => x + f(row), 0);
    const longest = Math.max(1e-300, ...rows.flatMap((row) => row.part).filter(Number.isFinite).map(Math.abs));
    const name = (row) => {
      if (row.id === -1) return rowHead(`all ${counted(d.vocabulary - d.k)} others`);
      const known = d.words.get(row.id), head = rowHead(word(known.text, known.kind));
      if (row.id >= 0) head.title = `token id ${row.id}`;      // else a secret's
      if (row.id === actual) head.append(node("span", { class: "kl-actual" }, " ◂ actual"));
      return head;
    };
    const line = (row) => [name(row), cell(row.p, decimal(row.p), row.p),
      ...d.names.flatMap((_, s) => [cell(row.q[s], decimal(row.q[s]), row.q[s]), cell(row.part[s], decimal(row.part[s]), row.part[s] / longest)])];
    const exact = (x) => cell(x, decimal(x, 6)), kl = (s) => d[way][s * d.n + i];
    const sums = (s) => [exact(sum((row) => row.q[s])), exact(sum((row) => row.part[s]))];
    const total = [rowHead("sum of these rows"), exact(sum((row) => row.p)), ...d.names.flatMap((_, s) => sums(s))];
    const shown = [rowHead("KL at this token"), node("td"), ...d.names.flatMap((_, s) => [node("td"), exact(kl(s))])];
    return tableOf(["candidate", "teacher p", ...d.names.flatMap((student) => [`${student} q`, WAYS[way].part])], rows.map(line), [total, shown]);
  }
  return { root: part.root, update };
}

// Where the KL is: by role or part, and the tokens with the most of it.
function createShares(choose) {
  let now = null;
  const again = () => update(now), by = choiceOf("share by", [["role", "role"], ["part", "part of a turn"]], again);
  const scroll = scrolling("share of KL"), list = node("ol", { class: "kl-list" });
  const unit = node("span", { class: "cb-note" }, "mean: nats per token");
  const bar = node("div", { class: "cb-bar" }, node("label", {}, "by ", by), unit);
  const shares = section("shares", "Share of KL", bar, scroll);
  const top = section("top", "Largest KL", list);

  function update(given) {
    now = given;
    const { d, tokens, mask, way, student, only } = now;
    const line = (g) => [rowHead(g.key), cell(g.tokens, counted(g.tokens)), cell(g.inMask, counted(g.inMask)), ...d.names.flatMap((_, s) => [
      cell(g.shares[s], `${(100 * g.shares[s]).toFixed(1)} %`, g.shares[s]), cell(g.sums[s] / g.tokens, decimal(g.sums[s] / g.tokens))])];
    const heads = d.names.flatMap((name) => [`${name} share`, "mean"]);
    scroll.replaceChildren(tableOf([by.value, "tokens", "in mask", ...heads], sharesOf(now, by.value).map(line)));
    shares.head.textContent = only ? `Share of KL: ${only}` : "Share of KL";
    top.head.textContent = `Largest KL of ${d.names[student]}${only ? `: ${only}` : ""}`;
    const listed = largestOf(now);
    if (!listed.length) list.replaceChildren(node("li", { class: "cb-note" }, "None of these tokens is a target: choose all tokens above to see the others."));
    else list.replaceChildren(...listed.map((i) => {
      const kl = d[way][student * d.n + i], about = node("span", { class: "cb-note" }, roleAt(tokens, i), mask[i] ? ", in mask" : "");
      return node("li", {}, node("button", { type: "button", "data-token": i, onclick: () => choose(i) },
        node("span", { class: "kl-at" }, String(i)), wordAt(tokens, i), about, numeral("span", kl, decimal(kl, 3))));
    }));
    mark(now.selected);
  }
  function mark(selected) {
    for (const button of list.querySelectorAll("button")) {
      if (Number(button.dataset.token) === selected) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
    }
  }
  return { roots: [shares.root, top.root], update, mark };
}

// Ten classes by logarithm, as the strip has them.
const classed = (values) => readHeats({ get: () => [{ name: "", values: Float32Array.from(values) }] })[0];

// A map of blocks × tokens, the first block at the bottom, the chosen token framed.
function createMap(title, unit, choose) {
  const canvas = node("canvas", { class: "kl-map", "aria-hidden": "true" }), said = node("div"), key = node("div", { class: "cb-key" });
  const box = node("div", { class: "kl-box", role: "slider", tabindex: 0, "aria-label": `${title} by block and token`, "aria-valuemin": 0 }, canvas);
  const root = node("div", {}, node("h3", {}, title), box, said, key);
  let now = null, selected = -1, block = 0, waiting = 0;
  const later = () => { if (!waiting) waiting = requestAnimationFrame(draw); };

  function draw() {
    waiting = 0;
    if (root.hidden || !box.clientWidth) return;
    const { n, blocks, heat } = now, ratio = window.devicePixelRatio || 1, width = Math.round(box.clientWidth * ratio);
    const row = Math.round(Math.max(3, Math.min(16, 160 / blocks)) * ratio), height = row * blocks;
    const columns = Math.min(width, n), level = new Int8Array(columns);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
      canvas.style.height = `${height / ratio}px`;
    }
    const paint = canvas.getContext("2d"), left = (x) => Math.floor(x * width / columns);
    paint.clearRect(0, 0, width, height);
    for (let b = 0; b < blocks; b++) {
      level.fill(-1);      // of tokens that share a column the largest is seen
      for (let i = 0; i < n; i++) { const x = Math.floor(i * columns / n); level[x] = Math.max(level[x], heat.levels[b * n + i]); }
      for (let x = 0; x < columns; x++) {
        if (level[x] < 0) continue;
        paint.fillStyle = CIVIDIS[level[x]];
        paint.fillRect(left(x), height - (b + 1) * row, left(x + 1) - left(x), row);
      }
    }
    if (selected >= 0) frame(paint, selected * width / n, Math.max(ratio, width / n), height, row, ratio);
  }

  // Dark within light, so that it is seen on every colour of the map.
  function frame(paint, left, wide, height, row, ratio) {
    for (const [colour, thick] of [["#fff", 5 * ratio], ["#000", 2 * ratio]]) {
      paint.strokeStyle = colour;
      paint.lineWidth = thick;
      paint.strokeRect(left - 2 * ratio, 0, wide + 4 * ratio, height);
      paint.strokeRect(left - 2 * ratio, height - (block + 1) * row, wide + 4 * ratio, row);
    }
  }

  function describe() {
    const text = selected < 0 ? "no token chosen" : `block ${block}, token ${selected} ${now.text(selected)}: ${now.value(block, selected)}`;
    said.textContent = selected < 0 ? "Choose a token by a click, or by arrow keys." : text;
    const values = { max: Math.max(0, now.n - 1), now: Math.max(0, selected), text };
    for (const [name, value] of Object.entries(values)) box.setAttribute(`aria-value${name}`, value);
  }

  function update(given) {
    now = given;
    root.hidden = !now.blocks;
    if (root.hidden) return;
    block = Math.min(block, Math.max(0, now.blocks - 1));
    const swatches = CIVIDIS.map((colour) => { const one = node("span"); one.style.background = colour; return one; });
    const scale = node("span", { class: "kl-scale", "aria-hidden": "true" }, ...swatches);
    key.replaceChildren(`${unit}: ≤ ${amount(now.heat.low)}`, scale, `${amount(now.heat.high)}, by logarithm`,
      node("span", {}, "first block at the bottom · ← → token · ↑ ↓ block"));
    mark(selected);
  }
  function mark(i) {
    selected = i >= 0 && i < now.n ? i : -1;
    if (root.hidden) return;
    describe();
    later();
  }

  box.addEventListener("click", (event) => {
    const at = canvas.getBoundingClientRect(), part = (x, n) => Math.max(0, Math.min(n - 1, Math.floor(x * n)));
    block = part(1 - (event.clientY - at.top) / at.height, now.blocks);
    choose(part((event.clientX - at.left) / at.width, now.n));
    mark(selected);
  });
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 100, PageUp: -100, Home: -now.n, End: now.n };
    const up = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (up) { block = Math.max(0, Math.min(now.blocks - 1, block + up)); mark(selected); }
    else if (event.key in steps) choose(Math.max(0, Math.min(now.n - 1, selected + steps[event.key])));
    else return;
    event.preventDefault();
  });
  const resized = new ResizeObserver(later);
  resized.observe(box);
  return { root, update, mark, remove() { resized.disconnect(); cancelAnimationFrame(waiting); } };
}

// What the strip sees as its model: tokens and masks of this view, one student's KL as its heat, and the choice of a token, which is everyone's.
function stripModel(model, heats) {
  let given = model.get("strip");
  const own = { ...given }, listeners = new Map(), shared = (name) => name.endsWith("selected") || name === "comm_live_update";
  const tell = (name) => { for (const act of listeners.get(`change:${name}`) || []) act(); };
  function changed() {      // whether there is another text; if not, the reader's place in it is kept
    if (given === model.get("strip")) return false;
    given = model.get("strip");
    Object.assign(own, given, { view: own.view });
    return true;
  }
  return {
    tell, changed,
    get: (name) => shared(name) ? model.get(name) : name === "heats" ? heats() : own[name],
    set(name, value) {
      if (shared(name)) return model.set(name, value);
      own[name] = value;
      tell(name);
    },
    save_changes: () => model.save_changes(),
    on(name, act) { if (shared(name)) model.on(name, act); else listeners.set(name, [...(listeners.get(name) || []), act]); },
    off(name, act) {
      if (shared(name)) model.off(name, act); else listeners.set(name, (listeners.get(name) || []).filter((other) => other !== act));
    },
  };
}

// The field, the two filters and the list by which a transcript is chosen.
function createPicker(model, ask, say) {
  const rows = () => model.get("choices"), at = () => model.get("chosen");
  const row = () => rows()[model.get("live") ? at() : 0];
  const words = ({ id, label, kind, largest }, i) => `${i + 1} · ${label}${kind ? ` · ${kind}` : ""} · ${id}${largest == null ? "" : ` · max ${amount(largest)} nats`}`;
  let listed = "";      // what the list was made from: thousands of options are not made anew at every click
  const number = node("input", { type: "number", min: 1, class: "kl-no", "aria-label": "number of the transcript", onchange: typed });
  const list = choiceOf("transcript", [], (value) => ask(Number(value)));
  const by = (name) => choiceOf(`${name} of transcripts`, [], () => fillList());
  const filters = { label: by("label"), kind: by("kind") }, total = node("span", { class: "cb-note" }), alone = node("span");
  const choose = node("span", { class: "kl-pick" }, node("label", {}, "transcript ", number), total, filters.label, filters.kind, list);

  function typed() {
    const i = Number(number.value) - 1, n = rows().length;
    if (number.value.trim() !== "" && Number.isInteger(i) && i >= 0 && i < n) return ask(i);
    say(number.value.trim() === "" ? `The number was empty, so nothing has changed: give one from 1 to ${counted(n)}.`
      : `There is no transcript ${number.value}: give a number from 1 to ${counted(n)}.`);
    number.value = at() + 1;
  }
  function fillList() {
    const fits = rows().map((_, i) => i).filter((i) => Object.entries(filters).every(([name, { value }]) => !value || rows()[i][name] === value));
    const others = fits.includes(at()) || !rows()[at()] ? [] : [at()];      // the one that is shown is never hidden
    list.replaceChildren(...[...others, ...fits].map((i) => node("option", { value: i, selected: i === at() }, words(rows()[i], i))));
    total.textContent = `of ${counted(rows().length)}${fits.length < rows().length ? `, ${counted(fits.length)} listed` : ""}`;
  }
  function update() {
    const many = model.get("live") && rows().length > 1, known = row();
    choose.hidden = !many;
    alone.hidden = many || !known;
    if (!many) return alone.replaceChildren(...(known ? [`transcript ${words(known, at())}`] : []));
    number.value = at() + 1;
    number.max = rows().length;
    const now = rows().map((one) => `${one.id}\n${one.label}\n${one.kind}`).join("\n\n");
    if (now !== listed) {
      listed = now;
      for (const [name, select] of Object.entries(filters)) {
        const values = [...new Set(rows().map((one) => one[name]))].sort();
        select.replaceChildren(node("option", { value: "" }, `every ${name}`), ...values.map((value) => node("option", { value }, value || "none")));
        select.hidden = values.length < 2;
      }
      fillList();
    } else if (list.value !== String(at())) fillList();
  }
  const disable = () => { for (const part of [number, list]) part.disabled = true; };
  return { parts: [choose, alone], update, disable };
}

// The controls: what only Python can compute is asked for on release, the rest is done here.
function createControls(model, changed) {
  let gone = false;      // whether the kernel is
  const send = (name, value) => { model.set(name, value); model.save_changes(); };
  const say = (text) => { waiting.textContent = text; };
  let pending = "";      // what the kernel was asked for and has not answered yet
  const ask = (name, value, text) => { pending = text; send(name, value); changed({}); say(text); };
  const slider = (label, low, high, step, act, release) => node("input", { type: "range", "aria-label": label, min: low, max: high, step,
    oninput: (e) => act(Number(e.target.value)), onchange: (e) => release(Number(e.target.value)) });
  const ways = Object.entries(WAYS).map(([way, { name }]) => [way, `${way}: ${name}`]);
  const picker = createPicker(model, (i) => ask("chosen", i, `Computing the KL of transcript ${i + 1} …`), say);
  const student = choiceOf("student", [], (value) => changed({ student: Number(value) }));
  const kind = choiceOf("kind of token", [], (value) => changed({ only: value }));
  const over = choiceOf("tokens counted", [["mask", "targets of the mask"], ["all", "all tokens"]], (value) => changed({ all: value === "all" }));
  const direction = choiceOf("direction of the KL", ways, (value) => send("direction", value));
  const warmth = node("output"), weight = node("output"), waiting = node("span", { class: "cb-note", role: "status" });
  const heat = slider("temperature", 0.1, 10, 0.1, (value) => { warmth.textContent = amount(value); },
    (value) => ask("temperature", value, `Computing at T = ${amount(value)}; until then the numbers are those of T = ${amount(model.get("divergence").temperature)} …`));
  const weigh = (value) => { weight.textContent = amount(value); changed({ beta: value }); };
  const beta = slider("weight beta", 0, 2, 0.01, weigh, (value) => send("beta", value));
  const labels = { student: node("label", {}, "student ", student), kind: node("label", {}, kind) };
  const root = node("div", { class: "cb-bar" }, ...picker.parts, labels.student, node("label", {}, "KL ", direction), node("label", {}, "of ", over), labels.kind,
    node("label", {}, "T ", heat, warmth), node("label", {}, "β ", beta, weight), waiting);
  const options = (select, texts, at) => select.replaceChildren(...texts.map((text, i) => node("option", { value: i, selected: i === at }, text)));

  function update({ d, way, student: s, beta: b, kinds, only, all }) {
    const live = model.get("live") && !gone;
    picker.update();
    options(student, d.names, s);
    kind.replaceChildren(...["", ...kinds.names].map((name) => node("option", { value: name, selected: name === only }, name || "of every kind")));
    labels.kind.hidden = kinds.names.length < 2;
    labels.student.hidden = d.names.length < 2;
    over.value = all ? "all" : "mask";
    direction.value = way;
    heat.max = Math.max(10, d.temperature);
    heat.value = d.temperature;
    heat.disabled = !live;
    beta.max = Math.max(2, b);
    beta.value = b;
    warmth.textContent = amount(d.temperature);
    weight.textContent = amount(b);
    say(live ? pending : "Another temperature needs the kernel.");
  }
  function lose() {
    gone = heat.disabled = true;
    picker.disable();
    say("");
  }
  return { root, update, lose, isPending: () => Boolean(pending), answered() { pending = ""; } };
}

// Creates the explorer in `el` from `model`; returns a function that takes it down.
function createKL(el, model) {
  if (!model.get("strip").tokens) {
    const text = model.get("problem") || "There are no tokens to show.";
    el.append(node("div", { class: "cb-strip" }, node("div", { class: "cb-message", role: "alert" }, text)));
    return () => el.replaceChildren();
  }
  const now = { student: 0, only: "", all: false }, choose = (i) => { model.set("selected", i); model.save_changes(); };
  const of = (values, size) => values.subarray(now.student * size, (now.student + 1) * size);      // one student's
  const strip = stripModel(model, () => [{ name: `${WAYS[now.way].name} of ${now.d.names[now.student]}${now.only ? `, ${now.only}` : ""}`, unit: "nats", edges: NATS, none: now.all ? "no value" : "not a target",
    values: Float32Array.from(of(now.d[now.way], now.d.n), (x, i) => isShown(now, i) ? x : NaN) }]);
  const controls = createControls(model, (given) => {
    Object.assign(now, given);
    if ("beta" in given) return summarize();
    if (!Object.keys(given).length) return hide(complain(""));
    strip.tell("heats");
    update();
  });
  const problem = node("div", { class: "cb-message", role: "alert" }), summary = node("div", { class: "kl-summary" });
  const note = node("div", { class: "cb-note" }), place = node("div", { class: "kl-strip" });
  const detail = createDetail(), shares = createShares(choose), grid = node("div", { class: "kl-grid" }, ...shares.roots);
  const main = node("div", { class: "kl-main" }, place, detail.root);
  const maps = { cosine: createMap("Cosine to the teacher", "1 − cosine", choose), distance: createMap("Distance to the teacher", "L2", choose) };
  const states = section("states", "Hidden states", maps.cosine.root, maps.distance.root);
  const root = node("div", { class: "cb-strip cb-kl", "data-lm-suppress-shortcuts": "true" },
    problem, controls.root, note, summary, main, grid, states.root);
  let gone = false;      // whether the kernel is
  root.addEventListener("keydown", (event) => event.stopPropagation());      // JupyterLab would take single keys for itself

  function read() {
    Object.assign(now, { d: readDivergence(model), kinds: readKinds(model), layers: readLayers(model), tokens: readTokens(strip), mask: readMasks(strip)[0].values,
      way: model.get("direction"), beta: model.get("beta"), selected: model.get("selected") });
    now.student = Math.min(now.student, now.d.names.length - 1);
    if (!now.kinds.names.includes(now.only)) now.only = "";      // another transcript may have none of them
  }

  function update() {
    complain(gone ? GONE : controls.isPending() ? "" : model.get("problem"));
    note.textContent = model.get("note") || "";
    controls.update(now);
    hide();
    summarize();
    detail.update(now);
    shares.update(now);
    const { d, layers } = now, size = layers.blocks * d.n, cosine = of(layers.cosine, size), distance = of(layers.distance, size);
    const common = { n: d.n, blocks: layers.blocks, text: (i) => now.tokens.texts[now.tokens.ids[i]].replaceAll("\n", "") };
    states.head.textContent = `Hidden states of ${d.names[now.student]}`;
    const turned = cosine.map((c) => Math.max(0, 1 - c));
    maps.cosine.update({ ...common, heat: classed(turned), value: (b, i) => `cosine ${amount(cosine[b * d.n + i], 5)}` });
    maps.distance.update({ ...common, heat: classed(distance), value: (b, i) => `L2 ${amount(distance[b * d.n + i], 4)}` });
    chose();
  }

  // Tokens of another transcript than the one that is chosen are not shown: they would look like its own.
  function hide() {
    const other = model.get("live") && model.get("shown") !== model.get("chosen");
    for (const part of [note, summary, main, grid]) part.hidden = other;
    states.root.hidden = other || !now.layers.blocks;
  }

  function complain(text) {
    problem.textContent = text;
    problem.hidden = !text;
  }

  function summarize() {
    const { d, way, beta, only } = now, part = (x) => numeral("span", x, amount(x, 4));
    summary.replaceChildren(...d.names.map((name, s) => {
      const { mean, n } = meanOver(now, s), loss = mean * d.temperature ** 2, over = `${counted(n)} target${n === 1 ? "" : "s"}${only ? ` (${only})` : ""}`;
      if (only && !n) return node("div", {}, node("b", {}, name), `: no target is of the kind ${only}.`);
      return node("div", {}, node("b", {}, name), `: mean ${WAYS[way].name} `, part(mean), ` nats over ${over} · times T² `,
        part(loss), way === "forward" && !only ? " (as in the loss) · times β " : " · times β ", part(loss * beta));
    }));
  }

  function chose() {
    now.selected = model.get("selected");
    detail.update(now);
    shares.mark(now.selected);
    for (const map of Object.values(maps)) map.mark(now.selected);
  }

  read();
  update();
  el.append(root);
  const removeStrip = createStrip(place, strip);
  // an answer of the kernel changes several of these at once, so they are read together afterwards
  let waiting = false;
  const guard = (act) => () => { try { act(); } catch (error) { complain(`This view cannot be shown: ${error.message}`); } };
  const renew = () => {
    if (!waiting) queueMicrotask(guard(() => {
      waiting = false;
      const other = strip.changed();
      read();
      strip.tell(other ? "tokens" : "heats");
      update();
    }));
    waiting = true;
  };
  // neither the list nor another temperature answers any more
  const lose = () => { gone = true; complain(GONE); controls.lose(); };
  const listeners = { "change:selected": guard(chose), comm_live_update: guard(lose),
    "change:answer": () => { controls.answered(); renew(); } };
  for (const name of ["problem", "divergence", "direction", "beta", "choices", "shown"]) listeners[`change:${name}`] = renew;
  for (const [name, act] of Object.entries(listeners)) model.on(name, act);
  return () => {
    removeStrip();
    for (const map of Object.values(maps)) map.remove();
    for (const [name, act] of Object.entries(listeners)) model.off(name, act);
    root.remove();
  };
}

const renderKL = guarded(({ model, el }) => createKL(el, model));

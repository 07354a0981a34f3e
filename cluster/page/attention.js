// The attention of every layer and head: small maps to choose from, one enlarged, and in words.

const KINDS = {
  cross: "Each row is a piece of the translation as it is written; it looks at the source pieces in the columns.",
  encoder: "Each row is a piece of the source; it looks at the source pieces in the columns.",
  decoder: "Each row is a piece of the translation as it is written; it looks at what was written before, in the columns.",
};
const SPECIAL = { "<s>": "begin", "</s>": "end", "<unk>": "unknown" };

const byId = (id) => document.getElementById(id);

// As it is shown, and as it is said.
const shown = (piece) => SPECIAL[piece] ?? piece.replaceAll("\u2581", "·");
const said = (piece) => SPECIAL[piece] ?? (piece.replaceAll("\u2581", " ").trim() || "blank");
const quoted = (piece) => `“${said(piece)}”`;
const percent = (weight) => `${(100 * weight).toFixed(1)} %`;

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export class AttentionView {
  constructor() {
    this.section = byId("attention");
    this.tooltip = byId("tooltip");
    this.kind = "cross";
    this.layer = null; // at first the last, which tells most of what belongs together
    this.head = 0; // -1: the mean over the layer's heads
    for (const input of this.section.querySelectorAll("input[name=kind]")) {
      input.addEventListener("change", () => this.#chooseKind(input.value));
    }
    this.#listenToGrid();
    this.#listenToHeads();
    this.#listenToRibbons();
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.tooltip.hidden = true;
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      if (this.maps) this.#draw();
    });
  }

  // maps: "attention" of the endpoint's answer, or null.
  show(maps) {
    this.maps = maps;
    this.section.hidden = !maps;
    this.tooltip.hidden = true;
    if (!maps) return;
    this.#offerKinds();
    this.#drawRibbon("source-ribbon", maps.source);
    this.#drawRibbon("target-ribbon", maps.outputs);
    this.layer = Math.min(this.layer ?? Infinity, maps[this.kind].length - 1);
    this.head = clamp(this.head, this.#firstHead, maps[this.kind][0].length - 1);
    this.#draw();
  }

  // A model without self-attention has only one kind: then there is nothing to choose.
  #offerKinds() {
    const inputs = [...this.section.querySelectorAll("input[name=kind]")];
    for (const input of inputs) input.closest("label").hidden = !this.maps[input.value];
    if (!this.maps[this.kind]) this.kind = "cross";
    for (const input of inputs) input.checked = input.value === this.kind;
    this.section.querySelector(".kinds").hidden = inputs.filter((input) => this.maps[input.value]).length < 2;
  }

  #chooseKind(kind) {
    this.kind = kind;
    this.layer = Math.min(this.layer, this.maps[kind].length - 1);
    this.head = Math.min(this.head, this.maps[kind][0].length - 1);
    this.#draw();
  }

  get #rows() {
    return this.kind === "encoder" ? this.maps.source : this.maps.outputs;
  }

  get #columns() {
    return this.kind === "decoder" ? this.maps.inputs : this.maps.source;
  }

  #weights(layer, head) {
    const heads = this.maps[this.kind][layer];
    if (head >= 0) return heads[head];
    return heads[0].map((row, r) =>
      row.map((_, c) => heads.reduce((sum, map) => sum + map[r][c], 0) / heads.length));
  }

  #name(layer, head) {
    return head < 0 ? `Layer ${layer + 1}, mean of its heads` : `Layer ${layer + 1}, head ${head + 1}`;
  }

  #draw() {
    byId("kind-note").textContent = KINDS[this.kind];
    this.colours = heatColours();
    this.#drawHeads();
    this.#drawChosen();
  }

  #drawChosen() {
    byId("head-title").textContent = this.#name(this.layer, this.head);
    this.chosen = this.#weights(this.layer, this.head);
    this.#drawGrid();
    this.#drawLinks();
    this.#highlight(null);
  }

  // The small maps: a row a layer, a column a head, the mean first.

  #drawHeads() {
    const layers = this.maps[this.kind];
    const box = byId("heads");
    box.replaceChildren();
    const first = this.#firstHead;
    box.style.gridTemplateColumns = `max-content repeat(${layers[0].length - first}, minmax(30px, 64px))`;
    const top = ["", ...(first < 0 ? ["mean"] : []), ...layers[0].map((_, head) => head + 1)];
    box.append(...top.map((text) => element("span", { className: "top", ariaHidden: "true" }, String(text))));
    layers.forEach((heads, layer) => {
      box.append(element("span", { className: "side", ariaHidden: "true" }, `layer ${layer + 1}`));
      for (let head = first; head < heads.length; head++) box.append(this.#thumb(layer, head));
    });
  }

  // The mean over the heads, where there are several.
  get #firstHead() {
    return this.maps[this.kind][0].length > 1 ? -1 : 0;
  }

  #thumb(layer, head) {
    const weights = this.#weights(layer, head);
    const canvas = element("canvas", { width: weights[0].length, height: weights.length });
    const context = canvas.getContext("2d");
    weights.forEach((row, r) => row.forEach((weight, c) => {
      context.fillStyle = this.colours(weight).background;
      context.fillRect(c, r, 1, 1);
    }));
    const isChosen = layer === this.layer && head === this.head;
    const thumb = element("button", { type: "button", className: "thumb", role: "radio",
      ariaChecked: String(isChosen), tabIndex: isChosen ? 0 : -1, ariaLabel: this.#name(layer, head) }, canvas);
    thumb.dataset.layer = layer;
    thumb.dataset.head = head;
    return thumb;
  }

  #listenToHeads() {
    const box = byId("heads");
    const placeOf = (thumb) => [Number(thumb.dataset.layer), Number(thumb.dataset.head)];
    box.addEventListener("click", (event) => {
      const thumb = event.target.closest(".thumb");
      if (thumb) this.#chooseHead(...placeOf(thumb));
    });
    box.addEventListener("pointerover", (event) => {
      const thumb = event.target.closest(".thumb");
      if (thumb) this.#tip(thumb, this.#summary(...placeOf(thumb)));
    });
    box.addEventListener("pointerout", () => { this.tooltip.hidden = true; });
    box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const thumb = event.target.closest(".thumb");
      if (!step || !thumb) return;
      event.preventDefault();
      const layers = this.maps[this.kind];
      const [layer, head] = placeOf(thumb);
      this.#chooseHead(clamp(layer + step[0], 0, layers.length - 1),
        clamp(head + step[1], this.#firstHead, layers[0].length - 1));
    });
  }

  #chooseHead(layer, head) {
    this.layer = layer;
    this.head = head;
    for (const thumb of byId("heads").querySelectorAll(".thumb")) {
      const isChosen = Number(thumb.dataset.layer) === layer && Number(thumb.dataset.head) === head;
      thumb.ariaChecked = String(isChosen);
      thumb.tabIndex = isChosen ? 0 : -1;
      if (isChosen) thumb.focus();
    }
    this.#drawChosen();
  }

  #summary(layer, head) {
    const weights = this.#weights(layer, head);
    let best = [0, 0];
    weights.forEach((row, r) => row.forEach((weight, c) => {
      if (weight > weights[best[0]][best[1]]) best = [r, c];
    }));
    const [r, c] = best;
    return `${this.#name(layer, head)}: strongest from ${quoted(this.#rows[r])} to ` +
      `${quoted(this.#columns[c])}, ${percent(weights[r][c])}`;
  }

  // The enlarged map.

  #drawGrid() {
    const grid = byId("grid");
    const head = element("tr", { role: "row" }, element("td", { role: "presentation" }));
    this.#columns.forEach((piece, c) => head.append(this.#edge(piece, -1, c, "columnheader")));
    const body = element("tbody", { role: "rowgroup" });
    this.#rows.forEach((piece, r) => {
      const row = element("tr", { role: "row" }, this.#edge(piece, r, -1, "rowheader"));
      this.#columns.forEach((_, c) => row.append(this.#cell(r, c)));
      body.append(row);
    });
    grid.replaceChildren(element("thead", { role: "rowgroup" }, head), body);
    this.#cellAt(0, 0).tabIndex = 0;
  }

  #edge(piece, r, c, role) {
    const edge = element("th", { role, tabIndex: -1, scope: c < 0 ? "row" : "col", ariaLabel: said(piece) }, shown(piece));
    edge.dataset.place = `${r} ${c}`;
    return edge;
  }

  #cell(r, c) {
    const weight = this.chosen[r][c];
    const colour = this.colours(weight);
    const cell = element("td", { role: "gridcell", tabIndex: -1, ariaLabel: this.#words(r, c) },
      weight >= 0.095 ? String(Math.round(100 * weight)) : "");
    cell.style.backgroundColor = colour.background;
    cell.style.color = colour.ink;
    cell.dataset.place = `${r} ${c}`;
    return cell;
  }

  #cellAt(r, c) {
    return byId("grid").querySelector(`[data-place="${r} ${c}"]`);
  }

  #words(r, c) {
    return `${quoted(this.#rows[r])} looks at ${quoted(this.#columns[c])}: ${percent(this.chosen[r][c])}`;
  }

  #listenToGrid() {
    const grid = byId("grid");
    const placeOf = (target) => target.closest("[data-place]")?.dataset.place.split(" ").map(Number);
    grid.addEventListener("pointerover", (event) => {
      const place = placeOf(event.target);
      if (place) this.#highlight(place, event.target.closest("[data-place]"));
    });
    grid.addEventListener("pointerleave", () => this.#highlight(null));
    grid.addEventListener("focusin", (event) => {
      const place = placeOf(event.target);
      if (!place) return;
      grid.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
      event.target.tabIndex = 0;
      this.#highlight(place, event.target);
    });
    grid.addEventListener("focusout", () => this.#highlight(null));
    grid.addEventListener("keydown", (event) => {
      const place = placeOf(event.target);
      const next = place && this.#next(event, place);
      if (!next) return;
      event.preventDefault();
      this.#cellAt(...next)?.focus();
    });
  }

  #next(event, [r, c]) {
    const lastRow = this.#rows.length - 1, lastColumn = this.#columns.length - 1;
    const least = (other) => (other < 0 ? 0 : -1); // the corner is empty
    switch (event.key) {
      case "ArrowLeft": return [r, Math.max(least(r), c - 1)];
      case "ArrowRight": return [r, Math.min(lastColumn, c + 1)];
      case "ArrowUp": return [Math.max(least(c), r - 1), c];
      case "ArrowDown": return [Math.min(lastRow, r + 1), c];
      case "Home": return event.ctrlKey ? [0, 0] : [r, 0];
      case "End": return event.ctrlKey ? [lastRow, lastColumn] : [r, lastColumn];
      default: return null;
    }
  }

  // A cell, or a piece at an edge: say its weight, mark its pieces in both sentences.

  #highlight(place, anchor) {
    for (const hot of this.section.querySelectorAll(".hot")) hot.classList.remove("hot");
    for (const piece of this.section.querySelectorAll(".piece")) piece.removeAttribute("style");
    if (!place) {
      this.tooltip.hidden = true;
      byId("readout").textContent = "Point at a cell or a piece, or go there with the keyboard, to see its weight.";
      return;
    }
    const [r, c] = place;
    for (const edge of [this.#cellAt(r, -1), this.#cellAt(-1, c)]) edge?.classList.add("hot");
    if (r >= 0) this.#rowPiece(r)?.classList.add("hot");
    if (c >= 0) this.#columnPiece(c)?.classList.add("hot");
    if (r >= 0 && c < 0) this.#columns.forEach((_, k) => this.#tint(this.#columnPiece(k), this.chosen[r][k]));
    if (c >= 0 && r < 0) this.#rows.forEach((_, k) => this.#tint(this.#rowPiece(k), this.chosen[k][c]));
    const words = r >= 0 && c >= 0 ? this.#words(r, c) : this.#edgeWords(r, c);
    byId("readout").textContent = words;
    if (anchor) this.#tip(anchor, words);
  }

  #edgeWords(r, c) {
    const isRow = r >= 0;
    const others = (isRow ? this.chosen[r] : this.chosen.map((row) => row[c]))
      .map((weight, index) => ({ weight, piece: (isRow ? this.#columns : this.#rows)[index] }))
      .sort((a, b) => b.weight - a.weight).slice(0, 3)
      .map(({ weight, piece }) => `${quoted(piece)} ${percent(weight)}`).join(", ");
    return isRow ? `${quoted(this.#rows[r])} looks at ${others}` : `${quoted(this.#columns[c])} is looked at by ${others}`;
  }

  #rowPiece(r) {
    return byId(this.kind === "encoder" ? "source-ribbon" : "target-ribbon").children[r];
  }

  #columnPiece(c) {
    // The decoder's columns are one later: they begin with the begin sign.
    if (this.kind === "decoder") return byId("target-ribbon").children[c - 1];
    return byId("source-ribbon").children[c];
  }

  #tint(piece, weight) {
    if (!piece) return;
    const colour = this.colours(weight);
    piece.style.backgroundColor = colour.background;
    piece.style.color = colour.ink;
  }

  #drawRibbon(id, pieces) {
    byId(id).replaceChildren(...pieces.map((piece) => element("span", { className: "piece" }, shown(piece))));
  }

  #listenToRibbons() {
    for (const [id, isSource] of [["source-ribbon", true], ["target-ribbon", false]]) {
      const ribbon = byId(id);
      ribbon.addEventListener("pointerover", (event) => {
        const index = [...ribbon.children].indexOf(event.target);
        if (index < 0) return;
        const isColumn = isSource && this.kind === "cross";
        const isShown = isColumn || isSource === (this.kind === "encoder");
        if (isShown) this.#highlight(isColumn ? [-1, index] : [index, -1], event.target);
      });
      ribbon.addEventListener("pointerleave", () => this.#highlight(null));
    }
  }

  // In words: what the map shows, for who cannot see it.

  #drawLinks() {
    const table = byId("links");
    table.caption.textContent = `The strongest link of each piece: ${this.#name(this.layer, this.head).toLowerCase()}`;
    table.tBodies[0].replaceChildren(...this.chosen.map((row, r) => {
      const best = row.indexOf(Math.max(...row));
      return element("tr", {},
        element("th", { scope: "row" }, said(this.#rows[r])),
        element("td", {}, said(this.#columns[best])),
        element("td", { className: "num" }, percent(row[best])));
    }));
  }

  #tip(anchor, text) {
    const box = anchor.getBoundingClientRect();
    this.tooltip.textContent = text;
    this.tooltip.hidden = false;
    const own = this.tooltip.getBoundingClientRect();
    const below = box.bottom + 8; // above it would hide the pieces at the edge
    const fits = below + own.height < innerHeight;
    this.tooltip.style.top = `${fits ? below : box.top - own.height - 8}px`;
    this.tooltip.style.left = `${clamp(box.left + box.width / 2 - own.width / 2, 4, innerWidth - own.width - 4)}px`;
  }
}

const clamp = (value, least, most) => Math.max(least, Math.min(value, most));

// Weight to colours, by the page's scheme; the ink is black or white, whichever reads better.
function heatColours() {
  const style = getComputedStyle(document.documentElement);
  const [low, high] = ["--tint", "--accent"].map((name) => rgb(style.getPropertyValue(name)));
  return (weight) => {
    const mixed = low.map((value, index) => Math.round(value + (high[index] - value) * weight));
    return { background: `rgb(${mixed.join(" ")})`, ink: luminance(mixed) > 0.179 ? "#000" : "#fff" };
  };
}

function rgb(colour) {
  const digits = colour.trim().slice(1);
  return [0, 2, 4].map((start) => parseInt(digits.slice(start, start + 2), 16));
}

// WCAG 2.2, relative luminance.
function luminance(channels) {
  const [r, g, b] = channels.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

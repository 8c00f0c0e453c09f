"use strict";
// Unpacking of the numbers, and writing of texts and numbers as plain text.

// Arrays of int32 and float32, little-endian, deflated.
async function unpack({ blob, layout }) {
  const packed = Uint8Array.from(atob(blob), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  return Object.fromEntries(Object.entries(layout).map(([name, [start, length, kind]]) =>
    [name, new (kind === "int" ? Int32Array : Float32Array)(bytes, 4 * start, length)]));
}

// Tokens are written as text nodes; invisible characters as marks.
const NAMES = { 0x9: "⇥", 0x61c: "ALM", 0x200b: "ZWSP", 0x200c: "ZWNJ", 0x200d: "ZWJ", 0x200e: "LRM", 0x200f: "RLM", 0x202a: "LRE",
  0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI",
  0xad: "SHY", 0xfeff: "BOM", 0xa0: "NBSP" };
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}\u00a0]/u;
function named(code) {
  if (code >= 0xdc80 && code <= 0xdcff) return (code - 0xdc00).toString(16).toUpperCase(); // a byte that is part of a character
  return NAMES[code] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}
function write(node, text, breaks = true) {
  if (!HIDDEN.test(text)) {
    node.append(text);
    return node;
  }
  let plain = "";
  const flush = () => { if (plain) node.append(plain); plain = ""; };
  for (const letter of text) {
    if (letter === "\n") {
      flush();
      node.append(el("span", "mark thin", "⏎"));
      if (breaks) node.append("\n");
    } else if (HIDDEN.test(letter)) {
      flush();
      node.append(el("span", "mark", named(letter.codePointAt(0))));
    } else plain += letter;
  }
  flush();
  return node;
}
function el(tag, kind = "", text = "", ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}
const cell = (text, kind = "") => el("td", kind, text);
function number(x, signed = false) {
  if (Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  const size = Math.abs(x);
  const text = size === 0 ? "0" : size < 5e-4 ? size.toExponential(1).replace("e-", "e−") : size < 1000 ? size.toFixed(3) : size.toPrecision(4);
  return (x < 0 ? "−" : signed && x > 0 ? "+" : "") + text;
}

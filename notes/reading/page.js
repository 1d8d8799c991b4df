"use strict";
const all = (css, root = document) => [...root.querySelectorAll(css)];
const facts = JSON.parse(document.getElementById("facts").textContent);

// Symbols and lines: what is pointed at lights up on both sides of its equation
function light(event) {
  const on = event.type !== "pointerout" && event.type !== "focusout";
  const from = event.target.closest("[data-s]");
  const article = from?.closest("article");
  if (!article) return;
  all(".lit", article).forEach(e => e.classList.remove("lit"));
  if (on) for (const key of from.dataset.s.split(" "))
    all(`[data-s~="${key}"]`, article).forEach(e => e.classList.add("lit"));
}
for (const type of ["pointerover", "pointerout", "focusin", "focusout"]) document.addEventListener(type, light);

// An equation's number copies its link
for (const no of all("a.no")) no.addEventListener("click", () => {
  navigator.clipboard?.writeText(no.href).then(() => {
    no.dataset.said = "copied";
    setTimeout(() => delete no.dataset.said, 1200);
  }, () => {});
});

// Words that belong to the pictures
for (const e of all("[data-say]")) e.textContent = facts[e.dataset.say + "-said"] ?? facts[e.dataset.say] ?? e.textContent;

// Sliders move a figure's --k, the column of its strips
for (const figure of all("figure.moving")) {
  const slider = figure.querySelector("input[type=range]"), output = figure.querySelector("output");
  const labels = facts[figure.id.slice(4)];
  const show = () => {
    figure.style.setProperty("--k", slider.value);
    output.textContent = labels[slider.value];
    slider.setAttribute("aria-valuetext", labels[slider.value]);
  };
  slider.addEventListener("input", show);
  show();
  const play = figure.querySelector(".play");
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶"; play.ariaLabel = "play"; };
  play?.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    play.textContent = "❚❚"; play.ariaLabel = "pause";
    timer = setInterval(() => { slider.stepUp(); show(); if (slider.value === slider.max) stop(); }, 120);
  });
}

// Eq. 11, computed here
const kl = document.getElementById("fig-kl");
function bell(mu, sigma) {
  let path = "M";
  for (let i = 0; i <= 200; i++) {
    const z = -5 + i / 20, density = Math.exp(-(((z - mu) / sigma) ** 2) / 2) / sigma / Math.sqrt(2 * Math.PI);
    path += `${i ? "L" : ""}${i * 2.2},${140 - Math.min(density, 1.1) * 120}`;
  }
  return path;
}
kl.addEventListener("input", () => {
  const [mu, sigma] = all("input", kl).map(input => Number(input.value));
  all(".move output", kl).forEach((output, i) => output.textContent = [mu, sigma][i].toFixed(2));
  kl.querySelector(".posterior").setAttribute("d", bell(mu, sigma));
  const value = -0.5 * (1 + Math.log(sigma ** 2) - mu ** 2 - sigma ** 2);
  document.getElementById("kl-value").textContent = `${Math.abs(value).toFixed(3)} nats`;
});

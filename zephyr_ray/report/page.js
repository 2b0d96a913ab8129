"use strict";

// Filters for samples. Without JavaScript they stay hidden, and all samples are shown.
for (const filters of document.querySelectorAll(".filters")) {
  const samples = [...filters.closest("section").querySelectorAll(".sample")];
  const fields = [...filters.querySelectorAll("input, select")];
  const state = filters.querySelector("output");

  const update = () => {
    const wanted = Object.fromEntries(fields.map((field) => [field.name, field.value]));
    const words = (wanted.words || "").trim().toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      const answers = [...sample.querySelectorAll(".answer")];
      const compares = answers.some((answer) => answer.dataset.outcome);
      for (const answer of answers) {
        // The selected model's answer is shown beside the first, with which it was compared.
        const isOther = wanted.model && answer.dataset.model !== wanted.model;
        answer.hidden = isOther && !(compares && answer === answers[0]);
      }
      const chosen = answers.filter((a) => !wanted.model || a.dataset.model === wanted.model);
      const text = [sample.querySelector(".prompt"), ...answers.filter((a) => !a.hidden)]
        .map((part) => part.textContent.toLowerCase())
        .join("\n");
      sample.hidden = !(
        chosen.length > 0 &&
        (!wanted.kind || sample.dataset.kind === wanted.kind) &&
        (!wanted.outcome || chosen.some((a) => a.dataset.outcome === wanted.outcome)) &&
        text.includes(words)
      );
      shown += !sample.hidden;
    }
    state.value = `${shown} of ${samples.length} samples`;
  };

  filters.addEventListener("input", update);
  filters.querySelector("button").addEventListener("click", () => {
    for (const field of fields) field.value = "";
    update();
    fields[0].focus();
  });
  filters.hidden = false;
  update();
}

// Makes boxes that scroll sideways focusable, so that the keyboard can scroll them.
const reach = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("resize", reach);
reach();

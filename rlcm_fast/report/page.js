"use strict";
// Shows one grid of each slider at a time; without JavaScript all grids stand below each other.
for (const slider of document.querySelectorAll("[data-slider]")) {
  const frames = [...slider.querySelectorAll("[data-frame]")];
  const input = slider.querySelector("input");
  if (!input) continue;
  const output = slider.querySelector("output");
  const show = () => {
    const chosen = Number(input.value);
    frames.forEach((frame, index) => { frame.hidden = index !== chosen; });
    output.textContent = frames[chosen].dataset.frame;
    input.setAttribute("aria-valuetext", `after ${frames[chosen].dataset.frame} iterations`);
  };
  input.addEventListener("input", show);
  slider.querySelector(".controls").hidden = false;
  show();
}

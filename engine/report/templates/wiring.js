"use strict";
// Draw each chart when it becomes visible: those in a closed element when it is opened.
const config = JSON.parse(document.getElementById("config").textContent);
const options = { config, renderer: "svg", actions: false, tooltip: { theme: "custom" } };

async function draw(within) {
  for (const plot of within.querySelectorAll(".plot:not([data-drawn])")) {
    if (plot.closest("details:not([open])")) continue;
    plot.dataset.drawn = "begun";
    const spec = JSON.parse(document.getElementById(plot.dataset.spec).textContent);
    try {
      // Vega sets a role and a name on its element, so draw in a hidden child of the labeled one.
      const drawing = plot.appendChild(document.createElement("div"));
      drawing.setAttribute("aria-hidden", "true");
      await vegaEmbed(drawing, spec, options);
      plot.dataset.drawn = "yes";
    } catch (error) {
      plot.textContent = "This chart could not be drawn. The table below contains its data.";
      throw error;
    }
  }
}

// A link to a run opens it.
function open() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const run = target && target.closest("details.run");
  if (run && !run.open) {
    run.open = true;
    target.scrollIntoView();
  }
}

for (const run of document.querySelectorAll("details.run")) run.addEventListener("toggle", () => draw(run));
window.addEventListener("hashchange", open);
open();
draw(document).then(() => { document.documentElement.dataset.drawn = "yes"; });

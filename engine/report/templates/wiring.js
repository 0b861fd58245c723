"use strict";
// Draws each chart once it is to be seen: those of a closed part when it is opened.
const config = JSON.parse(document.getElementById("config").textContent);
const options = { config, renderer: "svg", actions: false, tooltip: { theme: "custom" } };

async function draw(within) {
  for (const plot of within.querySelectorAll(".plot:not([data-drawn])")) {
    if (plot.closest("details:not([open])")) continue;
    plot.dataset.drawn = "begun";
    const spec = JSON.parse(document.getElementById(plot.dataset.spec).textContent);
    try {
      // inside, since Vega gives its own element a role and a name, which here is the text beside the chart
      const drawing = plot.appendChild(document.createElement("div"));
      drawing.setAttribute("aria-hidden", "true");
      await vegaEmbed(drawing, spec, options);
      plot.dataset.drawn = "yes";
    } catch (error) {
      plot.textContent = "This chart could not be drawn; its data is below.";
      throw error;
    }
  }
}

// a link to a run opens it
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

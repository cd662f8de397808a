"use strict";
{
  const values = JSON.parse(document.getElementById("values").textContent);
  // As in the level lines: even in the logarithm above a small loss, or one high wall hides all the rest.
  const finite = values.losses.flat().filter((loss) => loss !== null);
  const low = Math.min(...finite);
  const floor = Math.max(1e-3, 0.01 * Math.abs(low));
  const data = [];
  values.losses.forEach((row, y) => row.forEach((loss, x) => {
    if (loss !== null) data.push({ x: values.x[x], y: values.y[y], z: Math.log10(loss - low + floor) });
  }));
  document.getElementById("surface").hidden = false;
  const place = document.getElementById("graph");
  const start = { horizontal: -0.6, vertical: 0.5, distance: 2.2 };
  const graph = new vis.Graph3d(place, data, {
    style: "surface", width: "100%", height: "100%", showPerspective: true, showGrid: true, showShadow: false,
    keepAspectRatio: false, verticalRatio: 0.6, cameraPosition: start, xLabel: "first direction",
    yLabel: "second direction", zLabel: "mean loss",
    colormap: ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"], // viridis, as the level lines
    zValueLabel: (z) => (10 ** z + low - floor).toPrecision(3),
  });
  const turn = (horizontal, vertical, nearer) => {
    const now = graph.getCameraPosition();
    graph.setCameraPosition({
      horizontal: now.horizontal + horizontal,
      vertical: Math.min(1.5, Math.max(0, now.vertical + vertical)),
      distance: Math.min(5, Math.max(0.8, now.distance * nearer)),
    });
  };
  const keys = {
    ArrowLeft: [-0.1, 0, 1], ArrowRight: [0.1, 0, 1], ArrowUp: [0, 0.1, 1], ArrowDown: [0, -0.1, 1],
    "+": [0, 0, 0.9], "-": [0, 0, 1.1],
  };
  place.addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    turn(...keys[event.key]);
  });
  document.getElementById("reset").addEventListener("click", () => graph.setCameraPosition(start));
}

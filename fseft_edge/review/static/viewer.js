// Display of scan and mask on a canvas with NiiVue, in radiological convention, and drawing on the mask.

import { Drawing, eachVoxel, ERASING } from "/drawing.js";

const { DRAG_MODE, Niivue, NVImage, SHOW_RENDER, SLICE_TYPE } = globalThis.niivue ?? {};

export const WINDOWS = { soft: [-160, 240], lung: [-1350, 150], bone: [-450, 1050] }; // HU

// Based on Okabe and Ito (2008): distinguishable with all common forms of colour blindness. The first two are also the
// colours of the preview pictures.
const COLOURS = [
  [255, 150, 0], [60, 185, 255], [240, 228, 66], [0, 190, 140], [230, 140, 200], [235, 95, 40], [90, 130, 255],
  [235, 235, 235],
];

const CROSS = [0.5, 0.5, 0.5, 1];
const CROSS_PERCENT = 0.2; // width of the cross in percent of the width of the scan

// Position as fractions of the canvas: left, top, width, height. The axial plane is the largest.
const ALL_PLANES = [
  { sliceType: SLICE_TYPE?.AXIAL, position: [0, 0, 0.6, 1] },
  { sliceType: SLICE_TYPE?.CORONAL, position: [0.6, 0, 0.4, 0.5] },
  { sliceType: SLICE_TYPE?.SAGITTAL, position: [0.6, 0.5, 0.4, 0.5] },
];

export const colourOf = (label) => COLOURS[(label - 1) % COLOURS.length];

export function canDraw() {
  return Boolean(Niivue && document.createElement("canvas").getContext("webgl2"));
}

const FILLED = ["outline", "cut"]; // tools with which NiiVue fills what an outline encloses
const LEAST_FILL = 0.01; // NiiVue draws no outline of a drawing that is quite transparent

// NiiVue with another brush, other steps of undo, and an upload of changed slices only. NiiVue's own brush is a square in
// voxels, its undo fails beyond eight steps, and it uploads the whole drawing at every movement of the pen.
function drawingNiivue(options, pen) {
  return new (class extends Niivue {
    drawPt(x, y, z) {
      pen.start([x, y, z], 2 - this.drawPenAxCorSag);
    }

    drawPenLine(to, from) {
      pen.move([...from], [...to], 2 - this.drawPenAxCorSag);
    }

    drawAddUndoBitmap() {
      pen.end();
    }

    refreshDrawing(redraw = true) {
      pen.upload();
      if (redraw) this.drawScene();
    }

    mouseLeaveListener() {
      if (this.opts.drawingEnabled && this.uiData.mousedown) this.mouseUpListener(); // ends the stroke
      super.mouseLeaveListener();
    }
  })(options);
}

export class Viewer {
  #niivue;
  #drawing = null; // see Drawing; null until the first tool is chosen
  #tool = "look";
  #pen = { number: 1, radius: 3, tolerance: 40, reach: 20 }; // number of the organ; mm; HU; mm
  #edited = { slices: new Set() }; // slices that were drawn on, for the interpolation
  #dirty = null; // range of slices that NiiVue's texture lacks
  #onDrawn;
  #mask = null;
  #places = new Map(); // label value → position of the organ, see placesOf
  #hidden = new Set();
  #organs = [];
  #zoom = 1;
  #fill = 0.25;

  // onPosition: called with the position of the cross; onDrawn: called when the drawing has changed.
  constructor(onPosition, onDrawn) {
    this.#onDrawn = onDrawn;
    const pen = {
      start: (at, axis) => this.#startStroke(at, axis),
      move: (from, to, axis) => this.#moveStroke(from, to, axis),
      end: () => this.#endStroke(),
      upload: () => this.#upload(),
    };
    const options = {
      backColor: [16 / 255, 16 / 255, 18 / 255, 1],
      clipPlaneHotKey: "",
      crosshairColor: CROSS,
      crosshairWidth: CROSS_PERCENT,
      crosshairWidthUnit: "percent",
      dragAndDropEnabled: false,
      dragMode: DRAG_MODE.windowing,
      fontColor: [0.92, 0.92, 0.92, 1],
      isRadiologicalConvention: true,
      loadingText: "",
      logLevel: "error",
      multiplanarPadPixels: 6,
      multiplanarShowRender: SHOW_RENDER.NEVER,
      sagittalNoseLeft: true,
      showAllOrientationMarkers: true,
      viewModeHotKey: "",
    };
    this.#niivue = drawingNiivue(options, pen);
    this.#niivue.drawRimOpacity = 1;
    this.#niivue.onLocationChange = ({ vox, values }) => {
      const number = this.#drawing?.voxels[this.#drawing.indexOf(vox.map(Math.round))];
      const organ = this.#drawing ? this.#organs[number - 1] : this.#organs.find(({ label }) => label === values[1]?.value);
      onPosition({ slice: vox, hu: values[0]?.value, organ: organ?.name });
    };
  }

  async attach(canvas) {
    await this.#niivue.attachToCanvas(canvas);
    this.#niivue.opts.atlasOutline = 1;
    this.setPlanes("all");
  }

  // scan and mask: NIfTI files as bytes.
  async show(scan, mask, organs, range, fill) {
    const volume = await NVImage.loadFromUrl({
      url: scan, name: "scan.nii", colormap: "gray", cal_min: range[0], cal_max: range[1],
    });
    const overlay = await NVImage.loadFromUrl({ url: mask, name: "mask.nii.gz", opacity: fill });
    this.clear();
    this.#organs = organs;
    this.#hidden = new Set();
    this.#mask = overlay;
    this.#fill = fill;
    this.#places = placesOf(overlay);
    overlay.hdr.intent_code = 1002; // NIFTI_INTENT_LABEL: NiiVue draws outlines only for label maps
    overlay.setColormapLabel(this.#colours());
    this.#niivue.volumes = [volume]; // not addVolume: the first drawing then contains both scan and mask
    this.#niivue.addVolume(overlay);
    const flagged = organs.find((organ) => organ.flags.length && this.#places.has(organ.label));
    const largest = [...organs].sort((a, b) => b.volume_ml - a.volume_ml)[0];
    this.#moveTo((flagged ?? largest)?.label);
    this.#frameOrgans();
  }

  clear() {
    if (!this.#mask) return;
    this.setTool("look");
    if (this.#drawing) this.#niivue.closeDrawing();
    this.#drawing = null;
    this.#niivue.volumes = [];
    this.#niivue.updateGLVolume();
    this.#mask = null;
    this.#organs = [];
  }

  goTo(label) {
    if (!this.#moveTo(label)) return;
    if (this.#zoom > 1) this.zoom(1);
  }

  move(right, anterior, superior) {
    if (this.#mask) this.#niivue.moveCrosshairInVox(right, anterior, superior);
  }

  // Factor above 1: enlarge; below 1: reduce; 0: whole scan. The position of the cross becomes the centre.
  zoom(factor) {
    if (!this.#mask) return;
    const wanted = factor ? this.#zoom * factor : 1;
    this.#look(wanted, wanted > 1 ? this.#niivue.frac2mm(this.#niivue.scene.crosshairPos) : this.#middle());
  }

  setCross(shown) {
    this.#niivue.setCrosshairWidth(shown ? CROSS_PERCENT : 0);
  }

  setWindow([low, high]) {
    const [volume] = this.#niivue.volumes;
    if (!volume) return;
    [volume.cal_min, volume.cal_max] = [low, high];
    this.#niivue.updateGLVolume();
  }

  setFill(share) {
    this.#fill = share;
    if (this.#drawing) this.#niivue.setDrawOpacity(Math.max(share, LEAST_FILL));
    else if (this.#mask) this.#niivue.setOpacity(1, share);
  }

  setPlanes(name) {
    if (name === "all") {
      this.#niivue.setCustomLayout(ALL_PLANES);
      return;
    }
    this.#niivue.clearCustomLayout();
    const type = { axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL }[name];
    this.#niivue.setSliceType(type);
  }

  setShown(label, shown) {
    if (shown) this.#hidden.delete(label);
    else this.#hidden.add(label);
    if (!this.#mask) return;
    if (this.#drawing) {
      this.#setDrawnColours();
      return;
    }
    this.#mask.setColormapLabel(this.#colours());
    this.#niivue.updateGLVolume();
  }

  // Drawing

  get unsaved() {
    return Boolean(this.#drawing?.unsaved);
  }

  get canUndo() {
    return Boolean(this.#drawing?.canUndo);
  }

  get canRedo() {
    return Boolean(this.#drawing?.canRedo);
  }

  // name: "look", "brush", "eraser", "outline", "cut" or "grow". The first tool that draws begins the drawing.
  setTool(name) {
    if (name !== "look" && !this.#drawing) this.#draw(new Drawing(this.#drawnMask(this.#mask), ...this.#lattice()));
    this.#tool = name;
    if (this.#drawing) this.#niivue.setDrawingEnabled(name !== "look");
    this.#niivue.opts.isFilledPen = FILLED.includes(name);
    this.#niivue.opts.penValue = ERASING.includes(name) ? 0 : this.#pen.number;
  }

  // change: number of the organ from 1, radius in mm of the brush, tolerance in HU and reach in mm of the growing.
  setPen(change) {
    if (change.number && change.number !== this.#pen.number) this.#edited = { slices: new Set() };
    Object.assign(this.#pen, change);
    this.setTool(this.#tool);
  }

  // Diameter of the brush in pixels of the page at a place of the canvas; 0 if the tool has no brush there.
  brushAt(x, y) {
    if (!this.#drawing || !["brush", "eraser"].includes(this.#tool)) return 0;
    const { dpr } = this.#niivue.uiData;
    const apart = 10; // pixels
    const places = [x, x + apart].map((at) => this.#niivue.canvasPos2frac([at * dpr, y * dpr]));
    if (places.some(([at]) => at < 0)) return 0;
    const [from, to] = places.map((place) => this.#niivue.frac2mm(place));
    return (2 * this.#pen.radius * apart) / Math.hypot(...[0, 1, 2].map((axis) => to[axis] - from[axis]));
  }

  undo() {
    this.#step(this.#drawing?.undo());
  }

  redo() {
    this.#step(this.#drawing?.redo());
  }

  discard() {
    this.#step(this.#drawing.discard());
  }

  // Interpolate the selected organ between the slices that were drawn on. Return what was done, or why nothing was.
  interpolate() {
    const { axis, slices } = this.#edited;
    const drawn = [...slices].sort((a, b) => a - b);
    const gaps = drawn.slice(1).map((high, at) => [drawn[at], high]).filter(([low, high]) => high - low > 1);
    if (!gaps.length) return "Draw the organ on two slices of one plane that are not neighbours, then fill between them.";
    const { number } = this.#pen;
    const filled = gaps.filter(([low, high]) => this.#drawing.interpolate(axis, low, high, number));
    this.#step(this.#drawing.record(this.#drawing.voxels));
    this.#edited = { axis, slices: new Set([drawn.at(-1)]) };
    if (filled.length < gaps.length) return "A slice on which the organ was erased cannot be used to fill between slices.";
    return `Filled between slices ${filled.map(([low, high]) => `${low + 1} and ${high + 1}`).join(", ")}.`;
  }

  // Return the drawing as the server expects it, in the order of the mask file, and a function to call when it is saved.
  snapshot() {
    const { voxels, saved } = this.#drawing.snapshot();
    const stored = new Uint8Array(voxels.length);
    const { img2RASstart, img2RASstep } = this.#mask;
    eachVoxel(this.#drawing.lengths, img2RASstart, img2RASstep, (drawn, at) => {
      stored[at] = voxels[drawn];
    });
    return { stored, saved };
  }

  // Put what was drawn since the last time it was saved on another mask of the case, a NIfTI file as bytes.
  async redrawOn(mask) {
    const other = await NVImage.loadFromUrl({ url: mask, name: "mask.nii.gz" });
    this.#draw(this.#drawing.on(this.#drawnMask(other)));
  }

  #draw(drawing) {
    this.#drawing = null; // while NiiVue makes its empty drawing
    this.#niivue.createEmptyDrawing();
    this.#drawing = drawing;
    this.#niivue.drawBitmap = drawing.voxels;
    this.#hideMask();
    this.#setDrawnColours();
    this.setFill(this.#fill);
    this.#addDirty({ first: 0, last: drawing.lengths[2] - 1 });
    this.#niivue.refreshDrawing();
    this.#onDrawn();
  }

  // The drawing shows the mask from now on. As NiiVue's removeVolume, without its computation of all textures.
  #hideMask() {
    const niivue = this.#niivue;
    niivue.volumes = niivue.volumes.slice(0, 1);
    niivue.overlays = [];
    niivue.overlayTexture = niivue.rgbaTex(niivue.overlayTexture, niivue.gl.TEXTURE2, [2, 2, 2, 2], true); // empty
  }

  // Number of the organ of each voxel of a mask, in the order of a drawing.
  #drawnMask(mask) {
    const numbers = new Map(this.#organs.map(({ label }, at) => [label, at + 1]));
    const voxels = new Uint8Array(mask.img.length);
    eachVoxel(mask.dimsRAS.slice(1, 4), mask.img2RASstart, mask.img2RASstep, (drawn, at) => {
      const label = mask.img[at];
      if (!label) return;
      if (!numbers.has(label)) throw new Error(`The mask contains the label value ${label}, which is no organ of this case.`);
      voxels[drawn] = numbers.get(label);
    });
    return voxels;
  }

  #lattice() {
    return [this.#mask.dimsRAS.slice(1, 4), this.#mask.pixDimsRAS.slice(1, 4)];
  }

  // Whether the tool may change a voxel that has this value. An eraser takes from the selected organ only; what grows and
  // what is filled between slices takes nothing from other organs.
  #allowed = (before) => {
    if (ERASING.includes(this.#tool)) return before === this.#pen.number;
    return this.#tool !== "grow" || before === 0;
  };

  #startStroke(at, axis) {
    if (axis !== this.#edited.axis) this.#edited = { axis, slices: new Set() };
    if (this.#tool === "grow") {
      const [volume] = this.#niivue.volumes;
      const { img, img2RASstart: start, img2RASstep: steps } = volume;
      const first = start[0] + start[1] + start[2];
      const hu = (x, y, z) => img[first + x * steps[0] + y * steps[1] + z * steps[2]];
      const { number, reach, tolerance } = this.#pen;
      this.#drawing.grow(at, number, { hu, radius: reach, tolerance });
      return;
    }
    this.#edited.slices.add(at[axis]);
    this.#moveStroke(at, at, axis);
  }

  #moveStroke(from, to, axis) {
    if (this.#tool === "grow") return;
    const radius = FILLED.includes(this.#tool) ? 0 : this.#pen.radius;
    this.#drawing.line(from, to, axis, radius, this.#niivue.opts.penValue, this.#allowed);
    this.#addDirty(this.#around(to[2], axis === 2 ? 0 : radius), this.#around(from[2], axis === 2 ? 0 : radius));
  }

  #around(slice, radius) {
    const reach = Math.floor(radius / this.#drawing.spacing[2]);
    const last = this.#drawing.lengths[2] - 1;
    return { first: Math.max(slice - reach, 0), last: Math.min(slice + reach, last) };
  }

  #endStroke() {
    if (!this.#drawing) return;
    this.#step(this.#drawing.record(this.#niivue.drawBitmap, this.#allowed));
  }

  // Show a step of the drawing that has just been made, undone or redone.
  #step(range) {
    if (!range) return;
    this.#addDirty(range);
    this.#niivue.refreshDrawing();
    this.#onDrawn();
  }

  #addDirty(...ranges) {
    const all = this.#dirty ? [this.#dirty, ...ranges] : ranges;
    this.#dirty = {
      first: Math.min(...all.map(({ first }) => first)),
      last: Math.max(...all.map(({ last }) => last)),
    };
  }

  // Copy the changed slices of the drawing to the texture from which NiiVue draws.
  #upload() {
    if (!this.#dirty) return;
    const { gl, drawTexture, drawBitmap } = this.#niivue;
    const [width, height] = this.#drawing.lengths;
    const { first, last } = this.#dirty;
    this.#dirty = null;
    const slices = drawBitmap.subarray(width * height * first, width * height * (last + 1));
    gl.activeTexture(gl.TEXTURE7); // NiiVue's unit for the drawing
    gl.bindTexture(gl.TEXTURE_3D, drawTexture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    gl.texSubImage3D(gl.TEXTURE_3D, 0, 0, 0, first, width, height, last - first + 1, gl.RED, gl.UNSIGNED_BYTE, slices);
  }

  // As NiiVue's setDrawColormap, without its computation of all textures, which takes seconds.
  #setDrawnColours() {
    const lut = new Uint8ClampedArray(256 * 4);
    for (const [at, { label }] of this.#organs.entries()) {
      lut.set([...colourOf(label), this.#hidden.has(label) ? 0 : 255], 4 * (at + 1));
    }
    this.#niivue.drawLut = { lut, labels: [] };
    this.#niivue.refreshColormaps();
    this.#niivue.drawScene();
  }

  #middle() {
    return this.#niivue.frac2mm([0.5, 0.5, 0.5]);
  }

  #moveTo(label) {
    const place = this.#places.get(label);
    if (!place) return false;
    this.#niivue.scene.crosshairPos = this.#niivue.mm2frac(this.#mm(place.map(({ median }) => median)));
    this.#niivue.createOnLocationChange();
    this.#niivue.drawScene();
    return true;
  }

  // Enlarge the view so that all organs are visible. In the axial plane, the margin on each side is
  // a quarter of their size.
  #frameOrgans() {
    const places = [...this.#places.values()];
    if (!places.length) {
      this.#look(1, this.#middle());
      return;
    }
    const ends = [0, 1, 2].map((axis) => {
      const along = places.map((place) => place[axis]);
      return [Math.min(...along.map(({ first }) => first)), Math.max(...along.map(({ last }) => last))];
    });
    const [, ...lengths] = this.#mask.hdr.dims;
    const up = superiorAxis(this.#mask.hdr.affine);
    const scales = ends.map(([first, last], axis) => lengths[axis] / ((axis === up ? 1.1 : 1.5) * (last + 1 - first)));
    this.#look(Math.min(...scales, 3), this.#mm(ends.map(([first, last]) => (first + last) / 2)));
  }

  // NiiVue scales about the origin of the world coordinates, then translates.
  #look(zoom, at) {
    this.#zoom = Math.min(Math.max(zoom, 1), 8);
    const middle = this.#middle();
    this.#niivue.setPan2Dxyzmm([...[0, 1, 2].map((axis) => middle[axis] - this.#zoom * at[axis]), this.#zoom]);
  }

  #mm(voxel) {
    const rows = this.#mask.hdr.affine;
    return [0, 1, 2].map((row) => rows[row][3] + voxel.reduce((sum, at, axis) => sum + rows[row][axis] * at, 0));
  }

  #colours() {
    const labels = [0, ...this.#organs.map(({ label }) => label)];
    const colours = labels.map((label) => (label ? colourOf(label) : [0, 0, 0]));
    return {
      R: colours.map(([red]) => red),
      G: colours.map(([, green]) => green),
      B: colours.map(([, , blue]) => blue),
      A: labels.map((label) => (label && !this.#hidden.has(label) ? 255 : 0)),
      I: labels,
      labels: ["", ...this.#organs.map(({ name }) => name)],
    };
  }
}

// The voxel axis that is closest to the inferior-superior direction.
function superiorAxis(affine) {
  const rise = [0, 1, 2].map((axis) => Math.abs(affine[2][axis]) / Math.hypot(...[0, 1, 2].map((row) => affine[row][axis])));
  return rise.indexOf(Math.max(...rise));
}

// Label value → for each axis: first and last voxel of the organ, and median position of its voxels.
function placesOf({ img, hdr }) {
  const [, x, y, z] = hdr.dims;
  const counts = new Map();
  for (let k = 0, index = 0; k < z; k++) {
    for (let j = 0; j < y; j++) {
      for (let i = 0; i < x; i++, index++) {
        const label = img[index];
        if (!label) continue;
        if (!counts.has(label)) counts.set(label, [x, y, z].map((length) => new Uint32Array(length)));
        const [along, across, up] = counts.get(label);
        along[i]++;
        across[j]++;
        up[k]++;
      }
    }
  }
  return new Map([...counts].map(([label, axes]) => [label, axes.map(placeAlong)]));
}

function placeAlong(counts) {
  const half = counts.reduce((sum, count) => sum + count, 0) / 2;
  let sum = 0;
  return {
    first: counts.findIndex(Boolean),
    last: counts.findLastIndex(Boolean),
    median: counts.findIndex((count) => (sum += count) >= half),
  };
}

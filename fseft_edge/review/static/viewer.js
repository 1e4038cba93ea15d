// Display of scan and mask on a canvas with NiiVue, in radiological convention.

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

export class Viewer {
  #niivue;
  #mask = null;
  #places = new Map(); // label value → position of the organ, see placesOf
  #hidden = new Set();
  #organs = [];
  #zoom = 1;

  constructor(onPosition) {
    this.#niivue = new Niivue({
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
    });
    this.#niivue.onLocationChange = ({ vox, values }) => {
      const organ = this.#organs.find(({ label }) => label === values[1]?.value);
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
    if (this.#mask) this.#niivue.setOpacity(1, share);
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
    this.#mask.setColormapLabel(this.#colours());
    this.#niivue.updateGLVolume();
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

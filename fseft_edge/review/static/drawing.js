// A drawing on the voxels of a scan: brush, region growing, interpolation between slices, undo and redo. Nothing here
// knows of the page or of NiiVue.
//
// The voxels of a drawing are in the order of NiiVue: x to the right, y to the front, z to the head, x fastest. Each
// voxel has the number of its organ, from 1 in the order of the case's organs, or 0. `axis` is the axis that is
// perpendicular to a plane: 2 axial, 1 coronal, 0 sagittal.

export const ERASING = ["eraser", "cut"]; // tools that only take voxels away from the selected organ

export class Drawing {
  #base; // the voxels that the server has
  #last; // the voxels after the last recorded step
  #steps = []; // { where, before, after }: indices of the changed voxels, and their values
  #done = 0; // number of steps that are not undone
  #saved = 0; // value of #done when the server got these voxels; NaN if that state cannot be reached any more

  // voxels: Uint8Array; lengths: voxels along x, y, z; spacing: mm along x, y, z.
  constructor(voxels, lengths, spacing) {
    [this.voxels, this.lengths, this.spacing] = [voxels, lengths, spacing];
    [this.#base, this.#last] = [voxels.slice(), voxels.slice()];
  }

  // Return a drawing on other voxels, with what was drawn here since the last time it was saved as its only step.
  on(voxels) {
    const drawing = new Drawing(voxels, this.lengths, this.spacing);
    for (let index = 0; index < voxels.length; index++) {
      if (this.#last[index] !== this.#base[index]) voxels[index] = this.#last[index];
    }
    drawing.record(voxels);
    return drawing;
  }

  // Return to the voxels that the server has, without a way back; return the range of z.
  discard() {
    for (const voxels of [this.voxels, this.#last]) voxels.set(this.#base);
    [this.#steps, this.#done, this.#saved] = [[], 0, 0];
    return { first: 0, last: this.lengths[2] - 1 };
  }

  get unsaved() {
    return this.#done !== this.#saved;
  }

  get canUndo() {
    return this.#done > 0;
  }

  get canRedo() {
    return this.#done < this.#steps.length;
  }

  // Return the voxels as they are now, and a function to call when the server has them.
  snapshot() {
    const voxels = this.#last.slice();
    const steps = this.#steps.slice(0, this.#done);
    const saved = () => {
      this.#base = voxels;
      this.#saved = steps.every((step, at) => this.#steps[at] === step) ? steps.length : NaN;
    };
    return { voxels, saved };
  }

  // Record what was drawn since the last step as one step that can be undone. `voxels` may be a new array.
  // `allowed(before)` tells whether a voxel with this value may be changed; other voxels keep their values.
  // Return the changed range of z, or null.
  record(voxels, allowed = () => true) {
    this.voxels = voxels;
    const changed = [];
    const last = this.#last;
    for (let index = 0; index < voxels.length; index++) {
      if (voxels[index] === last[index]) continue;
      if (allowed(last[index])) changed.push(index);
      else voxels[index] = last[index];
    }
    if (!changed.length) return null;
    const where = Uint32Array.from(changed);
    const step = { where, before: pick(last, where), after: pick(voxels, where) };
    if (this.#saved > this.#done) this.#saved = NaN;
    this.#steps.length = this.#done;
    this.#steps.push(step);
    this.#done++;
    place(last, where, step.after);
    return this.#range(where);
  }

  undo() {
    if (!this.canUndo) return null;
    const { where, before } = this.#steps[--this.#done];
    return this.#put(where, before);
  }

  redo() {
    if (!this.canRedo) return null;
    const { where, after } = this.#steps[this.#done++];
    return this.#put(where, after);
  }

  #put(where, values) {
    place(this.#last, where, values);
    place(this.voxels, where, values);
    return this.#range(where);
  }

  #range(where) {
    const area = this.lengths[0] * this.lengths[1];
    return { first: Math.floor(where[0] / area), last: Math.floor(where.at(-1) / area) };
  }

  indexOf([x, y, z]) {
    return x + this.lengths[0] * (y + this.lengths[1] * z);
  }

  // Give a disc around a voxel a value, in the plane of the voxel. `radius` is in mm; 0 means one voxel.
  dot(centre, axis, radius, value, allowed) {
    const [across, down] = [0, 1, 2].filter((one) => one !== axis);
    const reach = (along) => Math.floor(radius / this.spacing[along]);
    const at = [...centre];
    for (let j = -reach(down); j <= reach(down); j++) {
      for (let i = -reach(across); i <= reach(across); i++) {
        if (Math.hypot(i * this.spacing[across], j * this.spacing[down]) > radius) continue;
        [at[across], at[down]] = [centre[across] + i, centre[down] + j];
        if (this.#isOutside(at)) continue;
        const index = this.indexOf(at);
        if (allowed(this.#last[index])) this.voxels[index] = value;
      }
    }
  }

  // Draw discs on a straight line between two voxels of a plane.
  line(from, to, axis, radius, value, allowed) {
    const steps = Math.max(1, ...from.map((start, one) => Math.abs(to[one] - start)));
    for (let step = 0; step <= steps; step++) {
      const point = from.map((start, one) => Math.round(start + ((to[one] - start) * step) / steps));
      this.dot(point, axis, radius, value, allowed);
    }
  }

  #isOutside(at) {
    return at.some((place, one) => place < 0 || place >= this.lengths[one]);
  }

  // Give an organ all background voxels that are connected by faces with a voxel, lie within `radius` mm of it, and whose
  // HU differ by at most `tolerance` from the mean of the 3x3x3 voxels around it. `hu(x, y, z)` returns HU.
  grow(seed, value, { hu, radius, tolerance }) {
    const near = [];
    for (let k = -1; k <= 1; k++) {
      for (let j = -1; j <= 1; j++) {
        for (let i = -1; i <= 1; i++) {
          const at = [seed[0] + i, seed[1] + j, seed[2] + k];
          if (!this.#isOutside(at)) near.push(hu(...at));
        }
      }
    }
    const mean = near.reduce((sum, one) => sum + one, 0) / near.length;
    const may = (at) => {
      if (this.#isOutside(at) || Math.abs(hu(...at) - mean) > tolerance) return false;
      const before = this.voxels[this.indexOf(at)];
      if (before !== 0 && before !== value) return false;
      return Math.hypot(...at.map((place, one) => (place - seed[one]) * this.spacing[one])) <= radius;
    };
    if (!may(seed)) return;
    const seen = new Set([this.indexOf(seed)]);
    const waiting = [seed];
    while (waiting.length) {
      const at = waiting.pop();
      this.voxels[this.indexOf(at)] = value;
      for (let axis = 0; axis < 3; axis++) {
        for (const by of [-1, 1]) {
          const next = [...at];
          next[axis] += by;
          const index = this.indexOf(next);
          if (seen.has(index) || !may(next)) continue;
          seen.add(index);
          waiting.push(next);
        }
      }
    }
  }

  // Give the slices between two slices of a plane the shape of an organ that lies between both shapes: the mean of the
  // signed distances to both contours, weighted by the distance of the slices (Raya and Udupa, IEEE Trans Med Imaging 9
  // (1990) 32-42). Voxels of other organs keep their values. Return false, and change nothing, if a slice has no voxel
  // of the organ.
  interpolate(axis, low, high, value) {
    const [below, above] = [low, high].map((at) => this.#signedDistance(axis, at, value));
    if (!below || !above) return false;
    for (let at = low + 1; at < high; at++) {
      const share = (at - low) / (high - low);
      this.#eachOf(axis, at, (index, number) => {
        const before = this.voxels[index];
        if (before !== 0 && before !== value) return;
        this.voxels[index] = (1 - share) * below[number] + share * above[number] < 0 ? value : 0;
      });
    }
    return true;
  }

  // Call `action(index of the voxel, number within the slice)` for each voxel of a slice.
  #eachOf(axis, slice, action) {
    const [across, down] = [0, 1, 2].filter((one) => one !== axis);
    const at = [0, 0, 0];
    at[axis] = slice;
    let number = 0;
    for (at[down] = 0; at[down] < this.lengths[down]; at[down]++) {
      for (at[across] = 0; at[across] < this.lengths[across]; at[across]++) action(this.indexOf(at), number++);
    }
  }

  // Distance in mm of each voxel of a slice to the contour of an organ, negative inside; null if the organ is not there.
  // The contour lies between voxels, half a voxel from their centres.
  #signedDistance(axis, slice, value) {
    const [across, down] = [0, 1, 2].filter((one) => one !== axis);
    const size = [this.lengths[across], this.lengths[down]];
    const inside = new Uint8Array(size[0] * size[1]);
    this.#eachOf(axis, slice, (index, number) => {
      inside[number] = this.voxels[index] === value ? 1 : 0;
    });
    if (!inside.includes(1)) return null;
    const spacing = [this.spacing[across], this.spacing[down]];
    const [toOrgan, toOthers] = [1, 0].map((wanted) => distanceTo(inside, wanted, size, spacing));
    return toOrgan.map((distance, number) => distance - toOthers[number]);
  }
}

const pick = (voxels, where) => Uint8Array.from(where, (index) => voxels[index]);

function place(voxels, where, values) {
  for (let at = 0; at < where.length; at++) voxels[where[at]] = values[at];
}

// Distance in mm of each pixel to the nearest pixel with the wanted value, by two passes along the axes (Felzenszwalb and
// Huttenlocher, Theory of Computing 8 (2012) 415-428). 0 for these pixels themselves.
function distanceTo(pixels, wanted, [width, height], [dx, dy]) {
  const squared = Float64Array.from(pixels, (value) => (value === wanted ? 0 : 1e12));
  for (let y = 0; y < height; y++) alongLine(squared, y * width, 1, width, dx);
  for (let x = 0; x < width; x++) alongLine(squared, x, width, height, dy);
  return squared.map(Math.sqrt);
}

// Replace the values f of a line by the lower envelope of the parabolas f(q) + (spacing (p - q))².
function alongLine(values, start, step, length, spacing) {
  const f = Float64Array.from({ length }, (_, q) => values[start + q * step]);
  const apex = new Int32Array(length);
  const border = new Float64Array(length + 1);
  const weight = spacing * spacing;
  const crossing = (q, p) => (f[q] - f[p] + weight * (q * q - p * p)) / (2 * weight * (q - p));
  let count = 0;
  [border[0], border[1]] = [-Infinity, Infinity];
  for (let q = 1; q < length; q++) {
    let from = crossing(q, apex[count]);
    while (from <= border[count]) from = crossing(q, apex[--count]);
    apex[++count] = q;
    [border[count], border[count + 1]] = [from, Infinity];
  }
  for (let p = 0, at = 0; p < length; p++) {
    while (border[at + 1] < p) at++;
    values[start + p * step] = f[apex[at]] + weight * (p - apex[at]) ** 2;
  }
}

// Call `action(index in the drawing, index in the file)` for each voxel. `start` and `steps` are those of NiiVue's image:
// where in the file the voxels along x, y and z of a drawing begin and follow one another.
export function eachVoxel([nx, ny, nz], start, steps, action) {
  const first = start[0] + start[1] + start[2];
  for (let z = 0, drawn = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      let stored = first + y * steps[1] + z * steps[2];
      for (let x = 0; x < nx; x++, drawn++, stored += steps[0]) action(drawn, stored);
    }
  }
}

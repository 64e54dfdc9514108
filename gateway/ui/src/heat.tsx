// The heat map of experts: a canvas with a pixel for each cell, scaled. Beside it the hottest cells as text.

import { useEffect, useRef, useState } from "preact/hooks";

interface Props {
  readonly bytes: Uint8Array;
  readonly columns: number;
  readonly unit: number;
  readonly column: string;
  readonly label: string;
}

// Load over the mean 0, 1, 2 and 3 or more, as in `moeserving experts show`: blue is idle, red is hot.
const STOPS: readonly (readonly [number, number, number])[] = [
  [33, 84, 166],
  [226, 226, 218],
  [232, 128, 36],
  [168, 16, 44],
];

const colour = (ratio: number): [number, number, number] => {
  const at = Math.min(ratio, STOPS.length - 1 - 1e-6);
  const [from, to, part] = [STOPS[Math.floor(at)]!, STOPS[Math.floor(at) + 1]!, at % 1];
  return [0, 1, 2].map((i) => Math.round(from[i]! + (to[i]! - from[i]!) * part)) as [number, number, number];
};

export function HeatMap({ bytes, columns, unit, column, label }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [cell, setCell] = useState<number | null>(null);
  const layers = Math.floor(bytes.length / columns);

  useEffect(() => {
    const element = canvas.current!;
    element.width = columns;
    element.height = layers;
    const image = new ImageData(columns, layers);
    const colours = Array.from({ length: 256 }, (_, byte) => colour(byte * unit));
    for (let at = 0; at < columns * layers; at++) image.data.set([...colours[bytes[at]!]!, 255], 4 * at);
    element.getContext("2d")!.putImageData(image, 0, 0);
  }, [bytes, columns, layers, unit]);

  const point = (event: MouseEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const y = Math.floor(((event.clientY - box.top) / box.height) * layers);
    setCell(x >= 0 && x < columns && y >= 0 && y < layers ? y * columns + x : null);
  };
  const move = (event: KeyboardEvent) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    setCell((now) => Math.min(Math.max((now ?? -by) + by, 0), columns * layers - 1));
  };
  const at = cell !== null && cell < bytes.length ? cell : null;
  const text =
    at === null
      ? "Point at a cell, or move with the arrow keys."
      : `Layer ${Math.floor(at / columns)}, ${column} ${at % columns}: ${(bytes[at]! * unit).toFixed(2)} times the mean of its layer.`;
  return (
    <div class="heat">
      <div class="axis" aria-hidden="true">
        <span>layer 0</span>
        <span>layer {layers - 1}</span>
      </div>
      <div>
        <canvas
          ref={canvas}
          class={columns > 64 ? "wide" : "narrow"}
          tabIndex={0}
          role="img"
          aria-label={label}
          aria-describedby="heat-cell"
          onMouseMove={point}
          onMouseLeave={() => setCell(null)}
          onKeyDown={move}
        />
        <div class="axis across" aria-hidden="true">
          <span>{column} 0</span>
          <span class="scale">
            idle <span class="ramp" /> 3 times the mean
          </span>
          <span>
            {column} {columns - 1}
          </span>
        </div>
        <p id="heat-cell" class="soft" aria-live="polite">
          {text}
        </p>
      </div>
    </div>
  );
}

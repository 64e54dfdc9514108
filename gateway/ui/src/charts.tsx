// Time series by uPlot. A chart is a picture for a screen reader, with its newest values in the caption.

import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { alone, clock, seconds } from "./words";

export interface Line {
  readonly label: string;
  readonly color: string;
  readonly values: readonly (number | null)[];
  readonly dashed?: boolean;
}

const HEIGHT = 170;
// A page that was just opened has few points.
const LEAST_RANGE_S = 60;
const style = (name: string) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The values beside which there is none on either side: no line shows them. */
const findAlone = (plot: uPlot, series: number): number[] => alone(plot.data[series] as (number | null)[]);

export function Chart(props: {
  title: string;
  times: readonly number[];
  lines: readonly Line[];
  format?: (value: number) => string;
  dark: boolean;
}) {
  const { title, times, lines, format = seconds, dark } = props;
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const data = [times, ...lines.map((line) => line.values)] as uPlot.AlignedData;
  const shape = lines.map((line) => line.label).join("|");

  useEffect(() => {
    const element = host.current!;
    const axis = { stroke: style("--soft"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line") } };
    const options: uPlot.Options = {
      width: element.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false },
      scales: { x: { time: true, range: (_plot, low, high) => [Math.min(low ?? 0, (high ?? 0) - LEAST_RANGE_S), high ?? 0] }, y: { range: (_plot, _low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: [{ ...axis, space: 90, values: (_plot, ticks) => ticks.map(clock) }, { ...axis, size: 62, values: (_plot, ticks) => ticks.map(format) }],
      series: [
        {},
        ...lines.map((line) => ({
          label: line.label,
          stroke: style(line.color),
          width: 2,
          ...(line.dashed ? { dash: [6, 5], points: { show: false } } : { points: { show: true, size: 5, filter: findAlone } }),
        })),
      ],
    };
    const made = new uPlot(options, data, element);
    plot.current = made;
    const resized = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: HEIGHT }));
    resized.observe(element);
    return () => {
      resized.disconnect();
      made.destroy();
    };
  }, [dark, shape]);

  useEffect(() => plot.current?.setData(data));

  const newest = lines.map((line) => ({ line, value: [...line.values].reverse().find((value) => value !== null) ?? null }));
  return (
    <figure class="chart">
      <figcaption>
        <strong>{title}</strong>
        {newest.map(({ line, value }) => (
          <span class="key" key={line.label}>
            <span class={`swatch ${line.color.slice(2)} ${line.dashed ? "dashed" : ""}`} aria-hidden="true" />
            {line.label} {value === null ? "–" : format(value)}
          </span>
        ))}
      </figcaption>
      <div ref={host} role="img" aria-label={`${title} over the last minutes; the newest values stand in the caption`} />
    </figure>
  );
}

//! Curves as inline SVG: axes with round numbers, and every point's values where the pointer rests on it.

use std::fmt::Write as _;

use super::html::escape;
use super::number;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 40.0;
/// Points that are drawn of one curve: more cannot be told apart.
const MAX_POINTS: usize = 400;
/// The colours of the style sheet.
const COLOURS: usize = 8;

/// One curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What it shows.
    pub name: String,
    /// (step, value), by step. Values that are no numbers are left out.
    pub points: Vec<(f64, f64)>,
    /// The number of its colour.
    pub colour: usize,
    /// Whether it is dashed, with a mark at every point.
    pub dashed: bool,
}

/// Curves over the steps of training.
#[derive(Debug, Clone, Copy)]
pub struct Chart<'a> {
    /// The caption.
    pub title: &'a str,
    /// The unit of the values.
    pub unit: &'a str,
    /// Whether the curves are named below.
    pub legend: bool,
    /// The curves.
    pub series: &'a [Series],
}

/// A range of numbers on a line of pixels.
#[derive(Debug, Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
    /// The pixels of `low` and `high`.
    from: f64,
    to: f64,
}

impl Axis {
    fn pixel(self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// About five round numbers.
    fn ticks(self) -> Vec<f64> {
        let step = round_step((self.high - self.low) / 5.0);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// 1, 2 or 5 times a power of ten, not below `size`.
fn round_step(size: f64) -> f64 {
    let power = 10f64.powf(size.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|factor| factor * power >= size * 0.999);
    factor.unwrap_or(10.0) * power
}

impl Chart<'_> {
    /// The chart as a `figure`; nothing where there is no point.
    pub fn figure(&self) -> String {
        let curves: Vec<(&Series, Vec<(f64, f64)>)> = self
            .series
            .iter()
            .map(|series| (series, drawn(&series.points)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        let all = || curves.iter().flat_map(|(_, points)| points);
        let Some((x_low, x_high)) = range(all().map(|point| point.0)) else {
            return String::new();
        };
        let Some((y_low, y_high)) = range(all().map(|point| point.1)) else {
            return String::new();
        };
        // A curve does not lie on the frame, and does not go below zero where nothing does.
        let air = (y_high - y_low) * 0.06;
        let y_low = if y_low >= 0.0 {
            (y_low - air).max(0.0)
        } else {
            y_low - air
        };
        let x = Axis {
            low: x_low,
            high: x_high,
            from: LEFT,
            to: WIDTH - RIGHT,
        };
        let y = Axis {
            low: y_low,
            high: y_high + air,
            from: HEIGHT - BOTTOM,
            to: TOP,
        };
        let unit = if self.unit.is_empty() {
            String::new()
        } else {
            format!(", {}", self.unit)
        };
        let caption = escape(&format!("{}{unit}", self.title));
        // Writing to a string cannot fail.
        let mut out = format!(
            "<figure>\n<figcaption>{caption}</figcaption>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{caption}\">\n"
        );
        frame(&mut out, x, y);
        for (series, points) in &curves {
            curve(&mut out, series, points, x, y);
        }
        out += "</svg>\n";
        if self.legend {
            out += "<div class=\"legend\">";
            for (series, _) in &curves {
                let (class, name) = (class(series), escape(&series.name));
                let _ = write!(out, "<span class=\"{class}\">{name}</span>");
            }
            out += "</div>\n";
        }
        out + "</figure>\n"
    }
}

fn class(series: &Series) -> String {
    let dashed = if series.dashed { " dashed" } else { "" };
    format!("c{}{dashed}", series.colour % COLOURS)
}

/// The points that are numbers, thinned evenly; the last one is always there.
fn drawn(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points
        .iter()
        .copied()
        .filter(|point| point.0.is_finite() && point.1.is_finite())
        .collect();
    let stride = finite.len().div_ceil(MAX_POINTS).max(1);
    let mut kept: Vec<_> = finite.iter().rev().step_by(stride).copied().collect();
    kept.reverse();
    kept
}

/// The smallest and the largest, apart from each other; none without values.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if low > high {
        return None;
    }
    if high - low > f64::EPSILON * high.abs().max(low.abs()) {
        return Some((low, high));
    }
    let air = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
    Some((low - air, high + air))
}

/// Grid lines with their numbers, and the name of the horizontal axis.
fn frame(out: &mut String, x: Axis, y: Axis) {
    for tick in y.ticks() {
        let at = y.pixel(tick);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            x.to,
            LEFT - 6.0,
            at + 4.0,
            label(tick)
        );
    }
    for tick in x
        .ticks()
        .into_iter()
        .filter(|tick| tick.fract() == 0.0 && *tick >= 0.0)
    {
        let at = x.pixel(tick);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/><text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>",
            y.from,
            y.from + 4.0,
            y.from + 18.0,
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">step</text>",
        x.to,
        HEIGHT - 6.0
    );
}

/// A round number, short.
fn label(tick: f64) -> String {
    let size = tick.abs();
    if size != 0.0 && !(1e-4..1e6).contains(&size) {
        return format!("{tick:e}");
    }
    // A multiple of a power of ten: at most seven digits after the point, less the zeros at the end.
    let text = format!("{tick:.7}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn curve(out: &mut String, series: &Series, points: &[(f64, f64)], x: Axis, y: Axis) {
    let _ = write!(
        out,
        "<g class=\"{}\"><polyline class=\"curve\" points=\"",
        class(series)
    );
    for (step, value) in points {
        let _ = write!(out, "{:.1},{:.1} ", x.pixel(*step), y.pixel(*value));
    }
    out.push_str("\"/>\n");
    let (class, radius) = match series.dashed || points.len() == 1 {
        true => ("point mark", 3),
        false => ("point", 6),
    };
    let name = escape(&series.name);
    for (step, value) in points {
        let _ = writeln!(
            out,
            "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\"><title>{name}, step {step}: {}</title></circle>",
            x.pixel(*step),
            y.pixel(*value),
            number(*value)
        );
    }
    out.push_str("</g>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(points: Vec<(f64, f64)>) -> String {
        let series = [Series {
            name: "a<b".into(),
            points,
            colour: 9,
            dashed: false,
        }];
        Chart {
            title: "Loss",
            unit: "nats",
            legend: true,
            series: &series,
        }
        .figure()
    }

    #[test]
    fn axes_have_round_numbers() {
        let axis = |low, high| Axis {
            low,
            high,
            from: 0.0,
            to: 1.0,
        };
        assert_eq!(axis(0.0, 1.0).ticks().len(), 6);
        assert_eq!(axis(3.0, 97.0).ticks(), [20.0, 40.0, 60.0, 80.0]);
        assert_eq!(
            axis(1.2, 1.31).ticks().into_iter().map(label).collect::<Vec<_>>(),
            ["1.2", "1.25", "1.3"]
        );
        assert_eq!(
            [2e-5, 5e-4, 0.0, 1e6, 1500.0].map(label),
            ["2e-5", "0.0005", "0", "1e6", "1500"]
        );
    }

    #[test]
    fn the_highest_value_stands_above_the_lowest() {
        let text = figure(vec![(1.0, 5.0), (2.0, f64::NAN), (3.0, 1.0)]);
        let document = roxmltree::Document::parse(&text).unwrap();
        let circles: Vec<_> = document
            .descendants()
            .filter(|node| node.has_tag_name("circle"))
            .collect();
        assert_eq!(circles.len(), 2, "NaN is not drawn");
        let y = |i: usize| circles[i].attribute("cy").unwrap().parse::<f64>().unwrap();
        assert!(y(0) < y(1), "pixels count from the top");
        let title = circles[1].first_element_child().unwrap().text().unwrap();
        assert_eq!(title, "a<b, step 3: 1.000");
    }

    #[test]
    fn one_point_equal_points_and_none() {
        assert!(figure(vec![(1.0, 0.0)]).contains("point mark"));
        assert!(figure(vec![(1.0, 2.0), (2.0, 2.0)]).matches("<circle").count() == 2);
        assert_eq!(figure(vec![(1.0, f64::INFINITY)]), "");
    }

    #[test]
    fn many_points_are_thinned_and_the_last_stays() {
        let points: Vec<_> = (1..=1001).map(|i| (f64::from(i), 1.0)).collect();
        let kept = drawn(&points);
        assert!(kept.len() <= MAX_POINTS && kept.len() > MAX_POINTS / 2);
        assert_eq!(kept.last(), Some(&(1001.0, 1.0)));
    }
}

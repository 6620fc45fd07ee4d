//! The two kinds of charts: lines over the cases of a workload, and panels of dots, one for each case.

use super::{
    canvas::{self, Align, Area, GRID, INK, LETTER, Look, MUTED, PLAIN, Scale, failed, line, marker, text},
    view::{Case, Metric, View},
};
use crate::bench::results::{Spread, Subject};
use graphdriver_core::Result;
use plotters::{coord::types::RangedCoordf64, prelude::*};

/// From values to pixels.
type Plane = Cartesian2d<RangedCoordf64, RangedCoordf64>;

const WIDTH: i32 = 1060;
/// Of one row of text.
const ROW: i32 = 18;
/// Letters of a subject's name.
const NAME: usize = 40;
/// Letters of a case's name.
const LABEL: usize = 14;

/// What a chart shows of the measurements.
#[derive(Clone, Copy)]
pub(super) struct Quantity {
    pub metric: Metric,
    /// What it is, in words: `bytes written to the device per byte written`.
    pub name: &'static str,
    /// Of the logarithmic axis.
    pub base: f64,
    pub show: fn(f64) -> String,
}

/// Lines over the cases of one workload, one for each subject.
pub(super) struct Lines<'a> {
    pub workload: &'a str,
    pub quantity: Quantity,
    /// What the cases are: `size of the file`.
    pub across: &'static str,
    /// Whether it is to stand alone, and so brings its own background.
    pub alone: bool,
}

/// One subject's line: a place for each case that it has.
struct Series<'a> {
    subject: &'a Subject,
    look: Look,
    points: Vec<(f64, Spread)>,
}

/// None if there is nothing to show.
pub(super) fn lines(view: View, chart: &Lines) -> Result<Option<String>> {
    let cases = view.cases(chart.workload);
    let series: Vec<Series> = view.measured().filter_map(|subject| series(view, subject, &cases, chart)).collect();
    if series.is_empty() {
        return Ok(None);
    }
    let scale =
        Scale::over(series.iter().flat_map(|s| &s.points).flat_map(|(_, v)| [v.min, v.max]), chart.quantity.base);
    let longest = series.iter().map(|s| s.subject.name.chars().count().min(NAME)).max().unwrap_or(0);
    let frame = Frame {
        left: 96,
        right: WIDTH - (longest as i32 * LETTER + 44),
        top: 34,
        bottom: 34 + 300.max(series.len() as i32 * ROW),
    };
    let label = format!("{} over {}", chart.quantity.name, chart.across);
    let drawn = canvas::svg((WIDTH, frame.bottom + 50), &label, |area| {
        if chart.alone {
            canvas::paper(area)?;
        }
        text(area, (8, 12), Align::Left, INK, &format!("{} (logarithmic)", chart.quantity.name), 120)?;
        let plane = axes(area, &frame, &scale, &cases, chart)?;
        for (at, one) in series.iter().enumerate() {
            // Side by side, or those that cost the same would hide each other.
            let aside = (at as i32 * 2 - (series.len() as i32 - 1)) * 5 / 2;
            draw_series(area, one, aside, &|x, y| plane.translate(&(x, scale.at(y))))?;
            legend(area, (frame.right + 26, frame.top + 8 + at as i32 * ROW), one.look, &one.subject.name)?;
        }
        Ok(())
    })?;
    Ok(Some(drawn))
}

/// A case's name without the size of its file, which is the same along the axis.
fn brief(name: &str) -> &str {
    name.split_once(" (").or_else(|| name.split_once(" of ")).map_or(name, |(brief, _)| brief)
}

/// Edges of the plot, in pixels.
struct Frame {
    left: i32,
    right: i32,
    top: i32,
    bottom: i32,
}

fn series<'a>(view: View<'a>, subject: &'a Subject, cases: &[Case], chart: &Lines) -> Option<Series<'a>> {
    let value = |case: &Case| Some((across(case.x), view.value(subject, *case, chart.quantity.metric)?));
    let points: Vec<_> = cases.iter().filter_map(value).collect();
    (!points.is_empty()).then(|| Series { subject, look: Look::of(view, subject), points })
}

/// Where a case is on its logarithmic axis; 0 is one step before 1.
fn across(x: u64) -> f64 {
    match x {
        0 => -1.0,
        x => (x as f64).log2(),
    }
}

/// The grid and what is written along it. Gives back the way from values to pixels.
fn axes(area: &Area, frame: &Frame, scale: &Scale, cases: &[Case], chart: &Lines) -> Result<Plane> {
    let places: Vec<f64> = cases.iter().map(|case| across(case.x)).collect();
    let (first, last) = (places[0], places[places.len() - 1]);
    let room = ((last - first) * 0.08).max(0.5);
    let pixels = (frame.left..frame.right, frame.bottom..frame.top);
    let plane = Plane::new(first - room..last + room, scale.low..scale.high, pixels);
    let place = |x, y| plane.translate(&(x, y));
    for tick in scale.ticks(8) {
        let y = place(first, tick).1;
        line(area, (frame.left, y), (frame.right, y), GRID, 1)?;
        text(area, (frame.left - 8, y), Align::Right, MUTED, &(chart.quantity.show)(scale.value(tick)), 10)?;
    }
    let mut free = i32::MIN;
    for (case, at) in cases.iter().zip(places) {
        let name = brief(case.name);
        let (x, half) = (place(at, scale.low).0, name.chars().count().min(LABEL) as i32 * LETTER / 2);
        line(area, (x, frame.top), (x, frame.bottom), GRID, 1)?;
        if x - half > free {
            text(area, (x, frame.bottom + 14), Align::Middle, MUTED, name, LABEL)?;
            free = x + half;
        }
    }
    let middle = (frame.left + frame.right) / 2;
    text(area, (middle, frame.bottom + 36), Align::Middle, MUTED, chart.across, 80)?;
    Ok(plane)
}

fn draw_series(area: &Area, one: &Series, aside: i32, place: &dyn Fn(f64, f64) -> (i32, i32)) -> Result<()> {
    let at = |x: f64, y: f64| {
        let (px, py) = place(x, y);
        (px + aside, py)
    };
    let path: Vec<_> = one.points.iter().map(|(x, value)| at(*x, value.median)).collect();
    let width = if one.look.plain { 1 } else { 2 };
    area.draw(&PathElement::new(path.clone(), one.look.colour.stroke_width(width))).map_err(failed)?;
    for ((x, value), point) in one.points.iter().zip(path) {
        line(area, at(*x, value.min), at(*x, value.max), one.look.colour, 1)?;
        marker(area, point, 5, one.look)?;
    }
    Ok(())
}

fn legend(area: &Area, (x, y): (i32, i32), look: Look, name: &str) -> Result<()> {
    line(area, (x - 12, y), (x + 10, y), look.colour, if look.plain { 1 } else { 2 })?;
    marker(area, (x - 1, y), 5, look)?;
    text(area, (x + 16, y), Align::Left, INK, name, NAME)
}

/// Panels side by side, one for each case, with a row for each subject: its value, its spread, and its filesystem's
/// plain directory as a mark.
pub(super) struct Panels<'a> {
    pub cases: Vec<(Case<'a>, &'a str)>,
    pub quantity: Quantity,
    /// Short values for the axis.
    pub tick: fn(f64) -> String,
}

const COLUMNS: usize = 3;
/// Letters of a value at a panel's right edge.
const VALUE: i32 = 11;

/// None if there is nothing to show.
pub(super) fn panels(view: View, chart: &Panels) -> Result<Option<String>> {
    let metric = chart.quantity.metric;
    let has = |subject: &Subject, case: &Case| view.value(subject, *case, metric).is_some();
    let subjects: Vec<&Subject> =
        view.measured().filter(|s| row_of_its_own(view, s) && chart.cases.iter().any(|(c, _)| has(s, c))).collect();
    let cases: Vec<_> = chart.cases.iter().filter(|(case, _)| subjects.iter().any(|s| has(s, case))).collect();
    if cases.is_empty() {
        return Ok(None);
    }
    let seen = cases.iter().flat_map(|(case, _)| view.measured().filter_map(|s| view.value(s, *case, metric)));
    let scale = Scale::over(seen.flat_map(|value| [value.min, value.max]), chart.quantity.base);
    let longest = subjects.iter().map(|s| s.name.chars().count().min(NAME)).max().unwrap_or(0);
    let names = longest as i32 * LETTER + 30;
    let (across, down) = ((WIDTH - names) / COLUMNS as i32, subjects.len() as i32 * ROW + 62);
    let rows = cases.len().div_ceil(COLUMNS) as i32;
    let drawn = canvas::svg((WIDTH, rows * down + 16), chart.quantity.name, |area| {
        for (at, (case, heading)) in cases.iter().enumerate() {
            let (column, row) = ((at % COLUMNS) as i32, (at / COLUMNS) as i32);
            let corner = (names + column * across, row * down + 8);
            if column == 0 {
                for (number, subject) in subjects.iter().enumerate() {
                    let y = corner.1 + 28 + number as i32 * ROW + ROW / 2;
                    text(area, (names - 10, y), Align::Right, INK, &subject.name, NAME)?;
                }
            }
            let panel = Panel { corner, across, scale: &scale, case: *case, heading, chart };
            panel.draw(area, view, &subjects)?;
        }
        Ok(())
    })?;
    Ok(Some(drawn))
}

/// Plain directories are marks in the rows of the drivers on their filesystem, unless there are none.
fn row_of_its_own(view: View, subject: &Subject) -> bool {
    subject.driver.is_some() || !view.drivers().any(|driver| driver.filesystem == subject.filesystem)
}

struct Panel<'a> {
    corner: (i32, i32),
    across: i32,
    scale: &'a Scale,
    case: Case<'a>,
    heading: &'a str,
    chart: &'a Panels<'a>,
}

impl Panel<'_> {
    fn draw(&self, area: &Area, view: View, subjects: &[&Subject]) -> Result<()> {
        let (left, top) = self.corner;
        let width = self.across - VALUE * LETTER - 6;
        let height = subjects.len() as i32 * ROW;
        text(area, (left, top + 10), Align::Left, INK, self.heading, (self.across / LETTER) as usize)?;
        let pixels = (left..left + width, top + 28..top + 28 + height);
        let plane = Plane::new(self.scale.low..self.scale.high, 0.0..subjects.len() as f64, pixels);
        let place = |value: f64, row: usize| plane.translate(&(self.scale.at(value), row as f64 + 0.5));
        for tick in self.scale.ticks(4) {
            let at = plane.translate(&(tick, 0.0)).0;
            line(area, (at, top + 28), (at, top + 28 + height), GRID, 1)?;
            text(area, (at, top + height + 40), Align::Middle, MUTED, &(self.chart.tick)(self.scale.value(tick)), 8)?;
        }
        for (row, subject) in subjects.iter().enumerate() {
            let value = view.value(subject, self.case, self.chart.quantity.metric);
            let base = view.baseline(subject).filter(|base| base.name != subject.name);
            let base = base.and_then(|base| view.value(base, self.case, self.chart.quantity.metric));
            let edge = (left + width + 8, place(1.0, row).1);
            self.row(area, Look::of(view, subject), value, base, edge, &|value| place(value, row))?;
        }
        Ok(())
    }

    /// From the baseline's mark to the value, which is also written at the right edge.
    fn row(
        &self,
        area: &Area,
        look: Look,
        value: Option<Spread>,
        base: Option<Spread>,
        edge: (i32, i32),
        place: &dyn Fn(f64) -> (i32, i32),
    ) -> Result<()> {
        if let Some(base) = base {
            let (x, y) = place(base.median);
            line(area, (x, y - 6), (x, y + 6), PLAIN, 3)?;
            if let Some(value) = value {
                line(area, (x, y), place(value.median), PLAIN, 1)?;
            }
        }
        let Some(value) = value else {
            return text(area, edge, Align::Left, MUTED, "–", 1);
        };
        line(area, place(value.min), place(value.max), look.colour, 2)?;
        marker(area, place(value.median), 5, look)?;
        text(area, edge, Align::Left, INK, &(self.chart.quantity.show)(value.median), VALUE as usize)
    }
}

/// `1`, `1k`, `100k`, `1M`: of powers of ten.
pub(super) fn short(value: f64) -> String {
    let of = |value: f64, unit: &str| format!("{}{unit}", (value * 1e4).round() / 1e4);
    match value {
        v if v >= 1e9 => of(v / 1e9, "G"),
        v if v >= 1e6 => of(v / 1e6, "M"),
        v if v >= 1e3 => of(v / 1e3, "k"),
        v => of(v, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn along_an_axis_names_are_brief() {
        let all = ["64 KiB", "1% of 64 MiB", "10 containers (64 MiB)"].map(brief);
        assert_eq!(all, ["64 KiB", "1%", "10 containers"]);
    }
}

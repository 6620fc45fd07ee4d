//! What charts are drawn of: text of a known size, markers, scales. Without a font library nothing here can know how wide
//! a text will be, so places are made for a wide font, and what does not fit is cut.

use super::view::{View, printable};
use crate::bench::results::Subject;
use graphdriver_core::{Error, ErrorKind, Result};
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

/// Colours of text, captions, lines of the grid and baselines. The style sheet replaces them for dark screens, by their values.
pub(super) const INK: RGBColor = RGBColor(0x24, 0x29, 0x2F);
pub(super) const MUTED: RGBColor = RGBColor(0x57, 0x60, 0x6A);
pub(super) const GRID: RGBColor = RGBColor(0xD8, 0xDE, 0xE4);
pub(super) const PLAIN: RGBColor = RGBColor(0x7F, 0x88, 0x92);
const PAPER: RGBColor = RGBColor(0xFF, 0xFF, 0xFE);

/// Okabe and Ito's colours, which colour-blind people tell apart, without the two that one of the backgrounds swallows.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
];
const SHAPES: usize = 5;

/// Pixels that a letter of text of 12 pixels may take.
pub(super) const LETTER: i32 = 7;
const TEXT: i32 = 12;

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// How a subject looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
    pub colour: RGBColor,
    shape: usize,
    pub plain: bool,
}

impl Look {
    /// Colours and shapes go round at different lengths, so that 30 drivers differ.
    pub fn of(view: View, subject: &Subject) -> Look {
        let (at, plain) = (view.position(subject), subject.driver.is_none());
        Look { colour: if plain { PLAIN } else { COLOURS[at % COLOURS.len()] }, shape: at % SHAPES, plain }
    }
}

/// Draws into a string: one `<svg>`, which says what it shows to those who cannot see it.
pub(super) fn svg((width, height): (i32, i32), label: &str, draw: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut drawn = String::new();
    {
        let backend = SVGBackend::with_string(&mut drawn, (width.unsigned_abs(), height.unsigned_abs()));
        let area = backend.into_drawing_area();
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    let label = format!("<svg role=\"img\" aria-label=\"{}\" ", super::view::escape(label));
    Ok(drawn.replacen("<svg ", &label, 1))
}

pub(super) fn failed(e: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Io, e.to_string()).doing("drawing a chart")
}

/// The background of a picture that stands alone.
pub(super) fn paper(area: &Area) -> Result<()> {
    area.fill(&PAPER).map_err(failed)
}

/// Where a text is, seen from its point.
#[derive(Clone, Copy)]
pub(super) enum Align {
    Left,
    Middle,
    Right,
}

/// Text at a height by its middle, cut to `letters`.
pub(super) fn text(
    area: &Area,
    at: (i32, i32),
    align: Align,
    colour: RGBColor,
    words: &str,
    letters: usize,
) -> Result<()> {
    let hpos = match align {
        Align::Left => HPos::Left,
        Align::Middle => HPos::Center,
        Align::Right => HPos::Right,
    };
    // The backend writes the size divided by this.
    let size = f64::from(TEXT) * 1.24;
    let style = TextStyle::from(("sans-serif", size).into_font()).color(&colour).pos(Pos::new(hpos, VPos::Center));
    area.draw(&Text::new(cut(words, letters), at, style)).map_err(failed)
}

/// The text, or what fits of it.
pub(super) fn cut(words: &str, letters: usize) -> String {
    let kept: String = words.chars().map(printable).take(letters).collect();
    match words.chars().nth(letters) {
        None => kept,
        Some(_) => kept.chars().take(letters.saturating_sub(1)).chain(['…']).collect(),
    }
}

pub(super) fn line(area: &Area, from: (i32, i32), to: (i32, i32), colour: RGBColor, width: u32) -> Result<()> {
    area.draw(&PathElement::new([from, to], colour.stroke_width(width))).map_err(failed)
}

/// A filled shape of about `r` pixels to each side.
pub(super) fn marker(area: &Area, (x, y): (i32, i32), r: i32, look: Look) -> Result<()> {
    let style = look.colour.filled();
    let corners: &[(i32, i32)] = match look.shape {
        0 => return area.draw(&Circle::new((x, y), r, style)).map_err(failed),
        1 => &[(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2 => &[(0, -1), (1, 1), (-1, 1)],
        3 => &[(-1, -1), (1, -1), (0, 1)],
        _ => &[(0, -1), (1, 0), (0, 1), (-1, 0)],
    };
    // A square of the same side looks larger than a circle, and the pointed shapes smaller.
    let r = match look.shape {
        1 => r - 1,
        _ => r + 1,
    };
    let corners: Vec<_> = corners.iter().map(|(dx, dy)| (x + dx * r, y + dy * r)).collect();
    area.draw(&Polygon::new(corners, style)).map_err(failed)
}

/// A logarithmic axis. What is 0 or less, and so has no place on one, is drawn at its beginning.
pub(super) struct Scale {
    base: f64,
    /// In powers of the base.
    pub low: f64,
    pub high: f64,
}

impl Scale {
    /// Over these values, to whole powers of the base.
    pub fn over(values: impl IntoIterator<Item = f64>, base: f64) -> Scale {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.into_iter().filter(|value| value.is_finite() && *value > 0.0) {
            // Rounding must not make 1000 a little less than 10³.
            low = low.min((value.log(base) + 1e-9).floor());
            high = high.max((value.log(base) - 1e-9).ceil());
        }
        match low.is_finite() {
            true => Scale { base, low, high: high.max(low + 1.0) },
            false => Scale { base, low: 0.0, high: 1.0 },
        }
    }

    /// Where a value is.
    pub fn at(&self, value: f64) -> f64 {
        match value > 0.0 {
            true => value.log(self.base).clamp(self.low, self.high),
            false => self.low,
        }
    }

    /// At most so many of the powers, evenly.
    pub fn ticks(&self, most: usize) -> Vec<f64> {
        let powers = (self.high - self.low) as usize;
        let step = powers.div_ceil(most.max(1)).max(1);
        (0..=powers).step_by(step).map(|power| self.low + power as f64).collect()
    }

    /// The value at a tick.
    pub fn value(&self, tick: f64) -> f64 {
        self.base.powf(tick)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_has_a_place_for_everything() {
        let scale = Scale::over([0.0, 3.0, 1000.0, f64::NAN, f64::INFINITY, -1.0], 10.0);
        assert_eq!((scale.low, scale.high), (0.0, 3.0));
        assert_eq!([scale.at(0.0), scale.at(-5.0), scale.at(f64::NAN), scale.at(1e9)], [0.0, 0.0, 0.0, 3.0]);
        assert_eq!(scale.ticks(8), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(scale.ticks(2), [0.0, 2.0]);
        assert_eq!(scale.value(2.0), 100.0);
        let empty = Scale::over([0.0], 10.0);
        assert_eq!((empty.low, empty.high), (0.0, 1.0));
        let one = Scale::over([4096.0], 16.0);
        assert_eq!((one.low, one.high), (3.0, 4.0));
    }

    #[test]
    fn long_text_is_cut_and_short_is_not() {
        assert_eq!([cut("overlay2", 8), cut("overlay2", 4), cut("a\u{1b}b", 9)], ["overlay2", "ove…", "a\u{fffd}b"]);
    }
}

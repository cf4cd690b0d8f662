//! Bars for medians, a line from the least to the largest value; no library could draw less.

use std::fmt::Write as _;

use super::{Figure, bounds, number};

const COLOURS: [&str; 6] = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#9c755f", "#76b7b2"];
const ROW: u32 = 22;
const LEFT: f64 = 190.0;
const LONGEST: f64 = 480.0;
const WIDTH: u32 = 860;

/// A picture of the figures, one below the other, each with a scale of its own.
pub(super) fn svg(title: &str, figures: &[Figure]) -> String {
    let mut picture = Picture { body: String::new(), y: 10 };
    picture.text(10.0, "bold", title);
    for figure in figures {
        draw(&mut picture, figure);
    }
    let height = picture.y + 10;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}</svg>\n",
        picture.body
    )
}

fn draw(picture: &mut Picture, figure: &Figure) {
    picture.y += ROW / 2;
    picture.text(10.0, "bold", &format!("{} ({})", figure.what, figure.unit));
    let largest = figure.series.iter().map(|series| bounds(&series.values).1).fold(0.0, f64::max);
    let scale = if largest > 0.0 { LONGEST / largest } else { 0.0 };
    for (series, colour) in figure.series.iter().zip(COLOURS.iter().cycle()) {
        let (least, most) = bounds(&series.values);
        let y = picture.y;
        picture.shape(format_args!(
            "<rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>",
            y + 4,
            series.median * scale,
            ROW - 8
        ));
        picture.shape(format_args!(
            "<path d=\"M{:.1} {middle}H{:.1}\" stroke=\"black\"/>",
            LEFT + least * scale,
            LEFT + most * scale,
            middle = y + ROW / 2
        ));
        let ratio = series.ratio.map_or_else(String::new, |ratio| format!(" ({ratio:.2}x)"));
        let value = format!("{}{ratio}", number(series.median));
        picture.label(LEFT + most * scale + 6.0, &value);
        picture.text(20.0, "normal", &series.name);
    }
}

struct Picture {
    body: String,
    /// Where the next row begins.
    y: u32,
}

impl Picture {
    /// A row of text.
    fn text(&mut self, x: f64, weight: &str, text: &str) {
        let y = self.y + ROW - 7;
        let text = escaped(text);
        self.shape(format_args!(
            "<text x=\"{x}\" y=\"{y}\" font-weight=\"{weight}\">{text}</text>"
        ));
        self.y += ROW;
    }

    /// Text in the row that is being drawn.
    fn label(&mut self, x: f64, text: &str) {
        let y = self.y + ROW - 7;
        self.shape(format_args!("<text x=\"{x:.1}\" y=\"{y}\">{}</text>", escaped(text)));
    }

    fn shape(&mut self, shape: std::fmt::Arguments<'_>) {
        writeln!(self.body, "{shape}").expect("a String takes all that is written");
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

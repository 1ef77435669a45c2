//! The little of SVG that the charts need. Colours are CSS variables, so that a page can be light or dark.

use std::fmt::Write as _;

/// Colours by the name of their variable: of a light page, and of a dark one. Lines are told apart by colour-blind
/// readers too (after Okabe and Ito), and besides by their dashes.
pub(crate) const PALETTE: [(&str, &str, &str); 12] = [
    ("--page", "#ffffff", "#14171a"),
    ("--ink", "#1b1f24", "#e6e8ea"),
    ("--muted", "#59636e", "#9aa4ae"),
    ("--grid", "#e3e6ea", "#2b3036"),
    ("--panel", "#f6f7f9", "#1b1f24"),
    ("--line0", "#0066b3", "#56a8f0"),
    ("--line1", "#c84c00", "#f2994a"),
    ("--line2", "#00795a", "#35c195"),
    ("--line3", "#9c3b87", "#dc8ac6"),
    ("--line4", "#7a6200", "#d6bb3f"),
    ("--line5", "#59636e", "#9aa4ae"),
    ("--line6", "#b3263a", "#f0798a"),
];
/// Colours of lines; further ones begin again, with other dashes.
const LINES: usize = 7;
const DASHES: [&str; 4] = ["", "6 3", "2 3", "9 3 2 3"];

/// Variable and dashes of the line with this number.
pub(crate) fn line_style(number: usize) -> (String, &'static str) {
    (format!("--line{}", number % LINES), DASHES[(number / LINES) % DASHES.len()])
}

/// Where text hangs on its point.
#[derive(Clone, Copy)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing of fixed size in its own units.
pub(crate) struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    pub(crate) fn new(width: f64, height: f64) -> Self {
        Self { body: String::new(), width, height }
    }

    pub(crate) fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(
            self.body,
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" style="stroke:var({colour});stroke-width:{width}"/>"#
        );
    }

    pub(crate) fn path(&mut self, points: &[(f64, f64)], colour: &str, dashes: &str, title: &str) {
        let mut data = String::new();
        for (number, (x, y)) in points.iter().enumerate() {
            let _ = write!(data, "{}{x:.1} {y:.1}", if number == 0 { "M" } else { "L" });
        }
        let dashes =
            if dashes.is_empty() { String::new() } else { format!(";stroke-dasharray:{dashes}") };
        let _ = writeln!(
            self.body,
            r#"<path d="{data}" style="fill:none;stroke:var({colour});stroke-width:2;stroke-linejoin:round{dashes}"><title>{}</title></path>"#,
            escape(title)
        );
    }

    pub(crate) fn dot(&mut self, (x, y): (f64, f64), radius: f64, colour: &str, title: &str) {
        let _ = writeln!(
            self.body,
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="{radius}" style="fill:var({colour})"><title>{}</title></circle>"#,
            escape(title)
        );
    }

    pub(crate) fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, colour: &str, text: &str) {
        self.styled((x, y), anchor, colour, "", text);
    }

    pub(crate) fn title(&mut self, (x, y): (f64, f64), text: &str) {
        self.styled((x, y), Anchor::Start, "--ink", ";font-weight:600;font-size:14px", text);
    }

    fn styled(
        &mut self,
        (x, y): (f64, f64),
        anchor: Anchor,
        colour: &str,
        style: &str,
        text: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" style="fill:var({colour}){style}">{}</text>"#,
            escape(text)
        );
    }

    /// The whole element.
    pub(crate) fn finish(self, label: &str) -> String {
        let Self { body, width, height } = self;
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{}" style="font-family:system-ui,'DejaVu Sans',sans-serif;font-size:12px">
{body}</svg>"#,
            escape(label)
        )
    }
}

/// How wide a text of ordinary size is, roughly: enough to keep labels apart.
pub(crate) fn width_of(text: &str) -> f64 {
    let wide = |c: &char| c.is_ascii_uppercase() || matches!(c, '@' | '=' | '_');
    text.chars().count() as f64 * 7.0 + text.chars().filter(wide).count() as f64 * 1.5
}

/// Text for HTML and SVG.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no place for these, however they are written.
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A drawing for viewers that know no CSS variables: the colours of a light page, on its background.
#[cfg(any(feature = "png", test))]
pub(crate) fn with_fixed_colours(svg: &str) -> String {
    let mut svg = svg.to_owned();
    for (name, light, _) in PALETTE {
        svg = svg.replace(&format!("var({name})"), light);
    }
    let background = format!(r#"<rect width="100%" height="100%" style="fill:{}"/>"#, PALETTE[0].1);
    match svg.find('>') {
        Some(end) => format!("{}{background}{}", &svg[..=end], &svg[end + 1..]),
        None => svg,
    }
}

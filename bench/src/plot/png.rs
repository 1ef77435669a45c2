//! Every chart as a picture, for where neither HTML nor SVG can go.

use std::path::Path;

use anyhow::{Context as _, Result};
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

use super::charts::charts;
use super::svg::with_fixed_colours;
use super::view::View;
use crate::report::{ensure_writable, write_atomically};

/// Pixels for one unit of a drawing.
const SCALE: f32 = 2.0;

/// Writes all charts of a view into a directory, each under its name.
pub(crate) fn write(view: &View, directory: &Path) -> Result<()> {
    let mut options = Options::default();
    options.fontdb_mut().load_system_fonts();
    anyhow::ensure!(
        !options.fontdb.is_empty(),
        "no font is installed, so that the charts would have no text: install one, such as fonts-dejavu-core"
    );
    let (overviews, cases) = charts(view);
    for chart in overviews.iter().chain(&cases) {
        let name: String = chart
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "+-_.@=".contains(c) { c } else { '-' })
            .take(120)
            .collect();
        let path = directory.join(format!("{name}.png"));
        ensure_writable(&path)?;
        write_atomically(&path, &render(&chart.svg, &options)?)?;
    }
    Ok(())
}

fn render(svg: &str, options: &Options<'_>) -> Result<Vec<u8>> {
    let tree = Tree::from_str(&with_fixed_colours(svg), options).context("a chart")?;
    let size = tree.size();
    let pixels = |length: f32| (length * SCALE).ceil() as u32;
    let mut pixmap = Pixmap::new(pixels(size.width()), pixels(size.height()))
        .context("a chart without an extent")?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixmap.as_mut());
    pixmap.encode_png().context("encoding a chart")
}

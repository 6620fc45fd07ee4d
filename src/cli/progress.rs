//! Progress bars, on a terminal only.

use graphdriver::progress::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::{collections::HashMap, io::IsTerminal, sync::Mutex, time::Duration};

/// One bar for each item under way.
pub(crate) struct Bars {
    all: MultiProgress,
    counting: bool,
    bars: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    /// None if standard error is no terminal.
    pub fn on_terminal() -> Option<Bars> {
        Self::new(false)
    }

    /// The same for what is counted in pieces instead of bytes.
    pub fn counting_on_terminal() -> Option<Bars> {
        Self::new(true)
    }

    fn new(counting: bool) -> Option<Bars> {
        let terminal = std::io::stderr().is_terminal();
        terminal.then(|| Bars { all: MultiProgress::new(), counting, bars: Mutex::default() })
    }

    fn bar(&self, total: Option<u64>) -> ProgressBar {
        let (bar, template) = match total {
            Some(total) if self.counting => (ProgressBar::new(total), "{msg:26} [{bar:30}] {pos}/{len} {elapsed}"),
            Some(total) => (ProgressBar::new(total), "{msg:14} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}"),
            None => (ProgressBar::new_spinner(), "{msg:14} {spinner} {bytes} {bytes_per_sec}"),
        };
        let bar = self.all.add(bar.with_style(ProgressStyle::with_template(template).expect("a valid template")));
        // Also while a slow source sends nothing.
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

impl Progress for Bars {
    fn advance(&self, item: &str, done: u64, total: Option<u64>) {
        let mut bars = self.bars.lock().expect("no panic holds it");
        let bar = bars.entry(item.to_owned()).or_insert_with(|| self.bar(total).with_message(item.to_owned()));
        bar.set_position(done);
    }

    fn finish(&self, item: &str) {
        if let Some(bar) = self.bars.lock().expect("no panic holds it").remove(item) {
            bar.finish_and_clear();
            self.all.remove(&bar);
        }
    }
}

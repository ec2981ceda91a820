//! The few pieces of HTML that a report is made of. What is given as text is escaped.

use std::fmt::Write as _;

/// Text that may come from anywhere, as HTML and XML have it. Control characters, which XML does not allow,
/// become spaces.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '&' => out += "&amp;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\n' | '\t' => out.push(c),
            // XML 1.0, production [2].
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// A table of texts with a head.
pub(super) fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: &[String]| {
        cells.iter().fold(String::new(), |mut out, cell| {
            // Writing to a string cannot fail.
            let _ = write!(out, "<{tag}>{}</{tag}>", escape(cell));
            out
        })
    };
    let mut out = format!(
        "<table>\n<thead><tr>{}</tr></thead>\n<tbody>\n",
        cells("th", head)
    );
    for row in rows {
        let _ = writeln!(out, "<tr>{}</tr>", cells("td", row));
    }
    out + "</tbody>\n</table>\n"
}

/// Something that is shown after a click on `summary`. `inner` is HTML.
pub(super) fn details(summary: &str, inner: &str) -> String {
    format!(
        "<details>\n<summary>{}</summary>\n{inner}</details>\n",
        escape(summary)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_breaks_out() {
        let table = table(&["a<b".into()], &[vec!["</td><script>'\"&\u{1}".into()]]);
        assert!(table.contains("<td>&lt;/td&gt;&lt;script&gt;&#39;&quot;&amp; </td>"));
        roxmltree::Document::parse(&table).unwrap();
    }
}

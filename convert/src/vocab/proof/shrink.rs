//! Cuts a text down to what makes a difference, so that a person can look at it.

/// A part of `text` for which `differs` still holds, and of which nothing can be left out without it ceasing to.
/// Source: Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002), the greedy half.
pub(super) fn shrink(text: &str, differs: impl Fn(&str) -> bool) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    let mut size = chars.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < chars.len() {
            let end = (at + size).min(chars.len());
            let rest: String = chars[..at].iter().chain(&chars[end..]).collect();
            if differs(&rest) {
                chars = rest.chars().collect();
            } else {
                at = end;
            }
        }
        size /= 2;
    }
    chars.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_matter_is_left_out() {
        let text = "a long text with an é in it, and ½ further on";
        let differs = |text: &str| text.contains('é') && text.contains('½');
        assert_eq!(shrink(text, differs), "é½");
        assert_eq!(shrink("x", |_| true), "");
    }
}

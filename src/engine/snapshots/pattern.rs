//! Go's regular expressions (RE2), which containerd's filters have, in the words of the crate `regex`.
//!
//! The two have most in common. Here is done what they have not: ASCII for `\d`, `\s`, `\w` and `\b`, `\Q…\E`, octal escapes,
//! braces and brackets that stand for themselves. What Go refuses is refused: classes within classes and their operators,
//! one repetition after another, the flags `x`, `u` and `R`, `\<`, `\u`.
//!
//! What remains: `\p{…}` takes the names of Go 1.25 and some more, where Go before it wants `\p{Lu}` and `\p{Greek}` exactly;
//! `(?<name>…)` is taken, as by Go 1.22; repetitions of repetitions are bounded by the size of the whole, and not by a
//! product of 1000; and where there are smaller bounds, of length here and of size and depth in `regex`, what Go takes is
//! refused.

use regex::Regex;

/// The pattern, or why Go or `regex` has none.
pub(super) fn compile(go: &str) -> Result<Regex, String> {
    if go.len() > LONGEST {
        return Err(format!("it has more than {LONGEST} bytes"));
    }
    Regex::new(&translated(go)?).map_err(|e| e.to_string())
}

fn translated(go: &str) -> Result<String, String> {
    let mut translation = Translation { rest: go, out: String::new(), no_class_ends: false };
    translation.all()?;
    Ok(translation.out)
}

struct Translation<'a> {
    rest: &'a str,
    out: String,
    /// There is no `:]` in the rest.
    no_class_ends: bool,
}

/// Bytes of a pattern, as many as a name can have. `regex` bounds what it compiles to, but not the time and memory before
/// that, which are 100 µs and 5 KiB for one `\pL`.
const LONGEST: usize = 4096;

/// What is repeated at most so often.
const MOST_REPEATED: u32 = 1000;

/// What `[:name:]` can name.
const NAMED: [&str; 14] = [
    "alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space", "upper", "word",
    "xdigit",
];

impl Translation<'_> {
    fn all(&mut self) -> Result<(), String> {
        let mut after_repetition = false;
        while let Some(c) = self.next() {
            let repetition = match c {
                '*' | '+' | '?' => Some(c.to_string()),
                '{' => self.counts()?,
                _ => None,
            };
            if repetition.is_some() && after_repetition {
                return Err("one repetition follows another".into());
            }
            after_repetition = repetition.is_some();
            match (repetition, c) {
                (Some(repetition), _) => {
                    self.out.push_str(&repetition);
                    if self.take("?") {
                        self.out.push('?');
                    }
                }
                (None, '(') => self.group()?,
                (None, '[') => self.class()?,
                (None, '\\') => self.backslash()?,
                (None, '^' | '$' | '.' | '|' | ')') => self.out.push(c),
                (None, c) => self.literal(c),
            }
        }
        Ok(())
    }

    /// After `{`: how often, if that is what it says.
    fn counts(&mut self) -> Result<Option<String>, String> {
        // Not a byte further: there may be a brace after each of many.
        let end = self.rest.find(|c: char| !c.is_ascii_digit() && c != ',').unwrap_or(self.rest.len());
        let (counts, rest) = self.rest.split_at(end);
        let Some(rest) = rest.strip_prefix('}') else { return Ok(None) };
        let is_number = |text: &str| {
            text.bytes().all(|c| c.is_ascii_digit()) && !text.is_empty() && (text == "0" || !text.starts_with('0'))
        };
        let (least, most) = counts.split_once(',').unwrap_or((counts, counts));
        if !is_number(least) || !(is_number(most) || most.is_empty()) {
            return Ok(None);
        }
        let allowed = |text: &str| text.parse().ok().filter(|n: &u32| *n <= MOST_REPEATED);
        match (allowed(least), most.is_empty(), allowed(most)) {
            (Some(_), true, _) => {}
            (Some(least), false, Some(most)) if least <= most => {}
            _ => return Err(format!("{{{counts}}} is no repetition")),
        }
        self.rest = rest;
        Ok(Some(format!("{{{counts}}}")))
    }

    /// After `(`. Nobody asks for what a group has matched.
    fn group(&mut self) -> Result<(), String> {
        if !self.take("?") {
            self.out.push_str("(?:");
            return Ok(());
        }
        if self.take("P<") || self.take("<") {
            let (name, rest) = self.rest.split_once('>').ok_or("the name of a group does not end")?;
            let is_name = !name.is_empty() && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_');
            if !is_name {
                return Err(format!("{name:?} cannot be the name of a group"));
            }
            self.rest = rest;
            self.out.push_str("(?:");
            return Ok(());
        }
        self.flags()
    }

    /// After `(?`. Of a flag that is given twice the last one holds.
    fn flags(&mut self) -> Result<(), String> {
        let (mut on, mut off) = (String::new(), String::new());
        let (mut negative, mut any) = (false, false);
        let end = loop {
            match self.next() {
                Some(flag @ ('i' | 'm' | 's' | 'U')) => {
                    on.retain(|c| c != flag);
                    off.retain(|c| c != flag);
                    if negative {
                        off.push(flag)
                    } else {
                        on.push(flag)
                    }
                    any = true;
                }
                Some('-') if !negative => (negative, any) = (true, false),
                Some(end @ (':' | ')')) if any || !negative => break end,
                _ => return Err("(? begins no group that Go has".into()),
            }
        };
        let minus = if off.is_empty() { "" } else { "-" };
        if end == ':' || !(on.is_empty() && off.is_empty()) {
            self.out.extend(["(?", &on, minus, &off]);
            self.out.push(end);
        }
        Ok(())
    }

    /// After `\`, outside of a class.
    fn backslash(&mut self) -> Result<(), String> {
        if self.take("Q") {
            let (text, rest) = self.rest.split_once("\\E").unwrap_or((self.rest, ""));
            self.rest = rest;
            self.out.push_str(&regex::escape(text));
        } else if self.take("b") {
            self.out.push_str("(?-u:\\b)");
        } else if self.take("B") {
            self.out.push_str("(?-u:\\B)");
        } else if self.take("A") {
            self.out.push_str("\\A");
        } else if self.take("z") {
            self.out.push_str("\\z");
        } else if !self.shorthand()? {
            let c = self.escaped()?;
            self.literal(c);
        }
        Ok(())
    }

    /// After `\`: a class of one letter, or a Unicode class.
    fn shorthand(&mut self) -> Result<bool, String> {
        let class = match self.rest.chars().next() {
            Some('d') => "[0-9]",
            Some('D') => "[^0-9]",
            Some('s') => "[\\t\\n\\f\\r ]",
            Some('S') => "[^\\t\\n\\f\\r ]",
            Some('w') => "[0-9A-Za-z_]",
            Some('W') => "[^0-9A-Za-z_]",
            Some('p' | 'P') => return self.unicode().map(|()| true),
            _ => return Ok(false),
        };
        self.next();
        self.out.push_str(class);
        Ok(true)
    }

    /// After `\`: `pL`, `p{Name}` or `p{^Name}`, and the same with `P` for what is not in it.
    fn unicode(&mut self) -> Result<(), String> {
        let mut not = self.next() == Some('P');
        let name = match self.next().ok_or("\\p needs a name")? {
            '{' => {
                let (name, rest) = self.rest.split_once('}').ok_or("the name after \\p{ does not end")?;
                self.rest = rest;
                let positive = name.strip_prefix('^');
                not ^= positive.is_some();
                positive.unwrap_or(name).to_owned()
            }
            letter => letter.to_string(),
        };
        if name.is_empty() || !name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_') {
            return Err(format!("{name:?} names no class of Unicode"));
        }
        self.out.extend([if not { "\\P{" } else { "\\p{" }, &name, "}"]);
        Ok(())
    }

    /// After `\`: a character.
    fn escaped(&mut self) -> Result<char, String> {
        let c = self.next().ok_or("a backslash is at the end")?;
        match c {
            'a' => Ok('\x07'),
            'f' => Ok('\x0c'),
            'n' => Ok('\n'),
            'r' => Ok('\r'),
            't' => Ok('\t'),
            'v' => Ok('\x0b'),
            'x' => self.hexadecimal(),
            '0'..='7' => {
                let more = self.rest.bytes().take(2).take_while(|c| matches!(c, b'0'..=b'7')).count();
                if c != '0' && more == 0 {
                    return Err(format!("\\{c} refers back"));
                }
                let (digits, rest) = self.rest.split_at(more);
                self.rest = rest;
                number(&format!("{c}{digits}"), 8)
            }
            c if c.is_ascii() && !c.is_ascii_alphanumeric() => Ok(c),
            c => Err(format!("there is no escape \\{c}")),
        }
    }

    /// After `\x`: two digits, or some in braces.
    fn hexadecimal(&mut self) -> Result<char, String> {
        let (digits, rest) = if self.take("{") {
            self.rest.split_once('}').ok_or("\\x{ does not end")?
        } else {
            self.rest.split_at_checked(2).ok_or("\\x needs two digits")?
        };
        self.rest = rest;
        number(digits, 16)
    }

    /// After `[`. All that it has is written so that it cannot be an operator.
    fn class(&mut self) -> Result<(), String> {
        let begin = if self.take("^") { "[^" } else { "[" };
        self.out.push_str(begin);
        let mut first = true;
        while first || !self.rest.starts_with(']') {
            first = false;
            if self.named_class()? || self.shorthand_in_class()? {
                continue;
            }
            let low = self.class_character()?;
            let is_range = self.rest.starts_with('-') && self.rest.len() > 1 && !self.rest.starts_with("-]");
            let high = if is_range && self.take("-") { self.class_character()? } else { low };
            self.out.push_str(&format!("\\x{{{:x}}}-\\x{{{:x}}}", low as u32, high as u32));
        }
        self.take("]");
        self.out.push(']');
        Ok(())
    }

    /// Passes on `[:name:]`. What `regex` knows by no such name it would take for a class within the class.
    fn named_class(&mut self) -> Result<bool, String> {
        let Some(rest) = self.rest.strip_prefix("[:").filter(|_| !self.no_class_ends) else { return Ok(false) };
        let Some(end) = rest.find(":]") else {
            self.no_class_ends = true;
            return Ok(false);
        };
        let (class, rest) = self.rest.split_at(end + 4);
        let name = &class[2..end + 2];
        if !NAMED.contains(&name.strip_prefix('^').unwrap_or(name)) {
            return Err(format!("there is no class {class}"));
        }
        self.rest = rest;
        self.out.push_str(class);
        Ok(true)
    }

    fn shorthand_in_class(&mut self) -> Result<bool, String> {
        let before = self.rest;
        let found = self.take("\\") && self.shorthand()?;
        if !found {
            self.rest = before;
        }
        Ok(found)
    }

    fn class_character(&mut self) -> Result<char, String> {
        match self.next().ok_or("a class does not end")? {
            '\\' => self.escaped(),
            c => Ok(c),
        }
    }

    fn literal(&mut self, c: char) {
        self.out.push_str(&regex::escape(c.encode_utf8(&mut [0; 4])));
    }

    fn take(&mut self, token: &str) -> bool {
        self.rest.strip_prefix(token).map(|rest| self.rest = rest).is_some()
    }

    fn next(&mut self) -> Option<char> {
        let mut rest = self.rest.chars();
        let c = rest.next()?;
        self.rest = rest.as_str();
        Some(c)
    }
}

fn number(digits: &str, radix: u32) -> Result<char, String> {
    let all_digits = digits.chars().all(|c| c.is_digit(radix));
    let value = Some(digits).filter(|_| all_digits).and_then(|digits| u32::from_str_radix(digits, radix).ok());
    value.and_then(char::from_u32).ok_or_else(|| format!("{digits:?} is no character's number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    /// Each with a text that it matches and one that it does not. Go 1.19 says the same of all.
    const TAKEN: &[(&str, &str, &str)] = &[
        ("^\\d+$", "0123", "٣"),
        ("^\\D$", "٣", "3"),
        ("^\\w$", "_", "é"),
        ("^\\W$", "é", "a"),
        ("^\\s$", "\x0c", "\x0b"),
        ("a\\b", "aé", "ab"),
        ("a\\B", "ab", "aé"),
        ("^.$", "é", "\n"),
        ("(?s)^.$", "\n", "ab"),
        ("\\Qa.b\\E$", "a.b", "axb"),
        ("\\Q[", "[", "x"),
        ("\\Qa\\E+b", "aab", "b"),
        ("a\\z", "ba", "a\n"),
        ("\\Aa", "ab", "ba"),
        ("^a$", "a", "a\n"),
        ("(?m)^a$", "b\na", "ab"),
        ("(?P<n>a)(?P<m>b)", "ab", "ba"),
        ("(?P<1>a)(?P<1>b)", "ab", "a"),
        ("^\\pL\\p{Lu}\\p{Greek}$", "aBγ", "abγ"),
        ("^\\PL\\P{^Lu}\\p{^L}$", "1B1", "1b1"),
        ("^[\\pN\\P{L}]$", "٣", "a"),
        ("(?i)É", "é", "e"),
        ("(?i-s:A)b", "ab", "aB"),
        ("(?i-i)a", "a", "A"),
        ("(?ii)a", "A", "b"),
        ("(?)a", "a", "b"),
        ("(?U)a+$", "aa", "b"),
        ("^[a[b]]$", "[]", "a"),
        ("^[a&&b]$", "&", "c"),
        ("^[+--]$", ",", "+-"),
        ("^[a~~b]$", "~", "c"),
        ("^[]a]$", "]", "b"),
        ("^[^]a]$", "b", "]"),
        ("^[a-]$", "-", "b"),
        ("^[\\w-]$", "-", "é"),
        ("^[[:alpha:]\\d]$", "7", "é"),
        ("^[[:^alpha:]]$", "é", "a"),
        ("^[^\\D]$", "3", "a"),
        ("^[\\]\\\\]$", "\\", "a"),
        ("^[\\x41-\\x{43}]$", "B", "D"),
        ("^\\101\\0$", "A\0", "A"),
        ("^a{2,3}$", "aa", "a"),
        ("^a{2,}?$", "aaa", "a"),
        ("^a{,2}$", "a{,2}", "a"),
        ("^a{01}$", "a{01}", "a"),
        ("^{}}$", "{}}", "{}"),
        ("^a{x$", "a{x", "a"),
        ("\\<a\\>", "<a>", "a"),
        ("\\_\\-\\ \\/\\#", "_- /#", "_-/#"),
        ("\\b{start}", "a{start}", "{start}"),
        ("a#b c", "a#b c", "a"),
        ("^(a|)*$", "aa", "b"),
        ("", "a", ""),
    ];

    const REFUSED: &[&str] = &[
        "a**",
        "a*+",
        "a{2}{3}",
        "a???",
        "*a",
        "a|*",
        "(*)",
        "a{1001}",
        "a{3,2}",
        "(",
        ")",
        "[",
        "[a",
        "[]",
        "[b-a]",
        "[a-\\d]",
        "[[:foo:]]",
        "[[:^^alpha:]]",
        "\\",
        "\\1",
        "\\8",
        "\\C",
        "\\E",
        "\\G",
        "\\Z",
        "\\h",
        "\\u0041",
        "\\U00000041",
        "\\x4",
        "\\x{}",
        "\\x{110000}",
        "\\x+1",
        "\\é",
        "\\pq",
        "\\p",
        "\\p{L",
        "\\p{Nothing}",
        "\\p{sc=Greek}",
        "(?x)a",
        "(?u)a",
        "(?R)a",
        "(?-)a",
        "(?i-)a",
        "(?i",
        "(?=a)",
        "(?!a)",
        "(?<=a)",
        "(?<!a)",
        "(?>a)",
        "(?P=n)",
        "(?P<>a)",
        "(?P<a-b>a)",
        "(?P<n",
        "(?#a)",
    ];

    #[test]
    fn what_go_takes_means_the_same() {
        for (pattern, yes, no) in TAKEN {
            let compiled = compile(pattern).unwrap_or_else(|e| panic!("{pattern}: {e}"));
            assert!(compiled.is_match(yes), "{pattern} {yes:?} {compiled}");
            assert!(pattern.is_empty() || !compiled.is_match(no), "{pattern} {no:?} {compiled}");
        }
    }

    #[test]
    fn what_go_refuses_is_refused() {
        for pattern in REFUSED {
            assert!(compile(pattern).is_err(), "{pattern}");
        }
    }

    /// What takes seconds if time grows with the square of the length.
    #[test]
    fn time_grows_with_the_length_alone() {
        for (piece, end) in
            [("{", "}"), ("{1", "}"), ("{1,", "x}"), ("[[:", "]"), ("[[:a", ""), ("\\Qa\\E", "\\E"), ("(?P<a>", "")]
        {
            let text = piece.repeat(500_000) + end;
            let begun = Instant::now();
            let _ = translated(&text);
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(3), "{piece}: {took:?}");
        }
    }

    #[test]
    fn what_costs_too_much_is_refused() {
        let many = |text: &str| text.repeat(LONGEST / text.len());
        for pattern in [many("(?i:[\\pL])"), many("\\pL{9}"), many("\\w{1000}"), "(".repeat(2000) + &")".repeat(2000)] {
            let begun = Instant::now();
            assert!(compile(&pattern).is_err(), "{pattern:.20}");
            assert!(begun.elapsed() < Duration::from_secs(10), "{pattern:.20}: {:?}", begun.elapsed());
        }
        assert!(compile(&many("a")).is_ok());
        assert!(compile(&(many("a") + "a")).is_err());
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "[\\[\\](){}\\\\^$.*+?|&~:xQEPpbdz0-9,a-c<>é-]{0,12}") {
            let _ = compile(&text);
        }

        #[test]
        fn quoted_text_matches_itself(text in "[^\\\\]*") {
            let pattern = compile(&format!("^\\Q{text}\\E$")).unwrap();
            prop_assert!(pattern.is_match(&text));
        }
    }
}

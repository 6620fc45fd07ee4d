//! containerd's filter language, for listing snapshots.
//!
//! ```text
//! filter   = selector { "," selector }          all have to hold; of several filters one
//! selector = path [ operator value ]            without operator: the field is there
//! path     = field { "." field }                name, parent, kind, labels.LABEL
//! field    = letters, digits, "_" and "-", or a string in double quotes
//! operator = "==" | "!=" | "~="                 the last one takes a regular expression of Go
//! value    = visible characters up to a comma or white space, or a string in double quotes; after "~=" also /…/ and |…|
//! ```
//!
//! White space is allowed only before a field, an operator and a value. A value that is not quoted begins with none of
//! `= ! ~ . " / |`. Quoted strings have Go's escapes, those in `/` and `|` too, with their own quote instead of `"`: `/\\d/`.
//! containerd 1.6 wants quotes around a field with "-", later ones take it as it is.

use super::{pattern, row::Snapshot};
use graphdriver_core::{Error, ErrorKind, Result};
use regex::Regex;
use std::sync::LazyLock;

/// Which snapshots are wanted.
#[derive(Debug)]
pub(super) struct Filters(Vec<Vec<Selector>>);

/// What is quoted may be no UTF-8, and is compared by its bytes.
type Bytes = Vec<u8>;

#[derive(Debug)]
struct Selector {
    path: Vec<Bytes>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(Bytes),
    NotEqual(Bytes),
    /// None: no regular expression, so that nothing matches it, as with containerd.
    Matches(Option<Regex>),
}

impl Filters {
    pub(super) fn parse(filters: &[String]) -> Result<Filters> {
        let mut patterns = 0;
        let parse = |text: &String| match text.as_str() {
            "" => Ok(Vec::new()),
            text => Parser { text, at: 0, patterns: &mut patterns }.filter(),
        };
        filters.iter().map(parse).collect::<Result<_>>().map(Filters)
    }

    pub(super) fn accept(&self, snapshot: &Snapshot) -> bool {
        self.0.is_empty() || self.0.iter().any(|filter| filter.iter().all(|selector| selector.accepts(snapshot)))
    }
}

impl Selector {
    fn accepts(&self, snapshot: &Snapshot) -> bool {
        let value = field(snapshot, &self.path);
        let text = value.as_deref().unwrap_or_default();
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some() && text.as_bytes() == wanted,
            Test::NotEqual(unwanted) => text.as_bytes() != unwanted,
            Test::Matches(pattern) => pattern.as_ref().is_some_and(|pattern| pattern.is_match(text)),
        }
    }
}

fn field(snapshot: &Snapshot, path: &[Bytes]) -> Option<String> {
    match path[0].as_slice() {
        b"name" => Some(snapshot.name.clone()),
        b"parent" => Some(snapshot.parent.clone().unwrap_or_default()),
        b"kind" => Some(snapshot.kind.to_string()),
        b"labels" => snapshot.labels.get(str::from_utf8(&path[1..].join(&b'.')).ok()?).cloned(),
        _ => None,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    /// How many there were in all filters.
    patterns: &'a mut usize,
}

/// Each can take 10 MiB.
const MOST_PATTERNS: usize = 32;

impl Parser<'_> {
    fn filter(&mut self) -> Result<Vec<Selector>> {
        if let Some(at) = self.text.find(['\0', char::REPLACEMENT_CHARACTER]) {
            self.at = at;
            return Err(self.error("neither NUL nor U+FFFD"));
        }
        let mut selectors = vec![self.selector()?];
        while self.take(",") {
            selectors.push(self.selector()?);
        }
        if self.at < self.text.len() { Err(self.error("a comma or the end")) } else { Ok(selectors) }
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.name()?];
        while self.take(".") {
            path.push(self.name()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Test::Present });
        }
        self.skip_space();
        let test = match self.while_true(is_operator).as_str() {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => self.pattern()?,
            _ => return Err(self.error("==, != or ~=")),
        };
        Ok(Selector { path, test })
    }

    fn pattern(&mut self) -> Result<Test> {
        let text = self.value(true)?;
        *self.patterns += 1;
        if *self.patterns > MOST_PATTERNS {
            let why = format!("filters with more than {MOST_PATTERNS} patterns");
            return Err(Error::new(ErrorKind::InvalidInput, why).hint("write one pattern with | between them"));
        }
        Ok(Test::Matches(pattern(&text)))
    }

    fn name(&mut self) -> Result<Bytes> {
        self.skip_space();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let name = self.while_true(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if name.is_empty() { Err(self.error("a field's name")) } else { Ok(name.into()) }
    }

    fn value(&mut self, pattern: bool) -> Result<Bytes> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if pattern => self.quoted(),
            None | Some(',' | '.' | '/' | '|') => Err(self.error("a value")),
            Some(c) if is_operator(c) => Err(self.error("a value")),
            Some(first) => {
                // Of the first character nothing else is asked.
                let begin = self.at;
                self.at += first.len_utf8();
                let rest = &self.text[self.at..];
                self.at += VISIBLE.find(rest).map_or(0, |found| found.end());
                Ok(self.text[begin..self.at].into())
            }
        }
    }

    /// A string with Go's escapes in quotes, which are the next character.
    fn quoted(&mut self) -> Result<Bytes> {
        let quote = self.next().expect("the caller has seen it");
        let mut bytes = Bytes::new();
        let push = |bytes: &mut Bytes, c: char| bytes.extend(c.encode_utf8(&mut [0; 4]).bytes());
        loop {
            match self.next() {
                None | Some('\n') => return Err(self.error("the end of the quoted string")),
                Some(c) if c == quote => return Ok(bytes),
                Some('\\') => match self.escaped(quote).ok_or_else(|| self.error("an escape as in Go"))? {
                    Escaped::Byte(byte) => bytes.push(byte),
                    Escaped::Char(c) => push(&mut bytes, c),
                },
                Some(c) => push(&mut bytes, c),
            }
        }
    }

    fn escaped(&mut self, quote: char) -> Option<Escaped> {
        Some(match self.next()? {
            'a' => Escaped::Char('\x07'),
            'b' => Escaped::Char('\x08'),
            'f' => Escaped::Char('\x0c'),
            'n' => Escaped::Char('\n'),
            'r' => Escaped::Char('\r'),
            't' => Escaped::Char('\t'),
            'v' => Escaped::Char('\x0b'),
            c if c == '\\' || c == quote => Escaped::Char(c),
            'x' => Escaped::Byte(self.number(2, 16)?.try_into().ok()?),
            'u' => Escaped::Char(go_char(self.number(4, 16)?)?),
            'U' => Escaped::Char(go_char(self.number(8, 16)?)?),
            '0'..='7' => {
                self.at -= 1;
                Escaped::Byte(self.number(3, 8)?.try_into().ok()?)
            }
            _ => return None,
        })
    }

    fn number(&mut self, digits: usize, radix: u32) -> Option<u32> {
        let text = self.text.get(self.at..self.at + digits)?;
        self.at += digits;
        text.chars().all(|c| c.is_digit(radix)).then(|| u32::from_str_radix(text, radix).ok())?
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn skip_space(&mut self) {
        self.while_true(char::is_whitespace);
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.text[self.at..].starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    fn next(&mut self) -> Option<char> {
        let c = self.text[self.at..].chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn while_true(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += end;
        rest[..end].into()
    }

    fn error(&self, expected: &str) -> Error {
        let reason = format!("expected {expected} at byte {} of the filter {:?}", self.at, self.text);
        Error::new(ErrorKind::InvalidInput, reason).hint("write name==VALUE, kind!=VALUE or labels.NAME~=/PATTERN/")
    }
}

enum Escaped {
    Byte(u8),
    Char(char),
}

/// What follows in a value that is not quoted: what Go calls graphic.
static VISIBLE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\A[\p{L}\p{M}\p{N}\p{P}\p{S}--,]+").expect("it is a pattern"));

fn is_operator(c: char) -> bool {
    matches!(c, '=' | '!' | '~')
}

/// Go writes a half of a surrogate pair as U+FFFD.
fn go_char(number: u32) -> Option<char> {
    char::from_u32(number).or((0xd800..0xe000).contains(&number).then_some(char::REPLACEMENT_CHARACTER))
}

fn pattern(text: &[u8]) -> Option<Regex> {
    let compiled = str::from_utf8(text).map_err(|e| e.to_string()).and_then(pattern::compile);
    let shown = String::from_utf8_lossy(&text[..text.len().min(200)]);
    compiled.inspect_err(|e| tracing::warn!("the pattern {shown:?} of a filter matches nothing: {e}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphdriver_core::{LayerId, store::LayerKind};
    use proptest::prelude::*;

    fn snapshot() -> Snapshot {
        let labels = [
            ("a", "1"),
            ("containerd.io/gc.root", "x,y"),
            ("very complex", "q\"q"),
            ("accent", "é"),
            ("my-label", "a=!~.\"/|é"),
        ];
        Snapshot {
            name: "default/7/key".into(),
            layer: LayerId(3),
            kind: LayerKind::Active,
            parent: None,
            created: 1,
            updated: 1,
            labels: labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            id_maps: None,
        }
    }

    fn accepts(filters: &[&str]) -> bool {
        let filters: Vec<_> = filters.iter().map(|filter| filter.to_string()).collect();
        Filters::parse(&filters).unwrap().accept(&snapshot())
    }

    #[test]
    fn what_matches() {
        for yes in [
            &[][..],
            &[""],
            &["name"],
            &["parent"],
            &["parent==\"\""],
            &["name==default/7/key"],
            &[" kind == active,\n name != other"],
            &["kind==committed", "kind==active"],
            &["labels.a==1,labels.a!=2"],
            &["labels.my-label==a=!~.\"/|é"],
            &["labels. \"containerd.io/gc.root\"==\"x,y\""],
            &["labels.\"very complex\"==\"q\\\"q\""],
            &["\"labels\".a", "kind==view"],
            &["labels.missing!=1"],
            &["name~=/default\\/[0-9]+/"],
            &["name~=|t/\\\\d/k|"],
            &["name~=\"\\\\d\""],
            &["name~=\\d/\\Qkey\\E\\z"],
            &["name~=^def"],
            &["labels.a==\"\\x31\"", "kind==none"],
            &["labels.accent==\"\\xc3\\xa9\",labels.accent==\"\\303\\251\",labels.accent==\"\\u00e9\""],
            &["labels.accent!=\"\\xe9\""],
            &["labels.\"\\xff\"!=a"],
        ] {
            assert!(accepts(yes), "{yes:?}");
        }
        for no in [
            "name==other",
            "labels.missing",
            "labels.missing==\"\"",
            "kind==view",
            "size",
            "name~=/[/",
            "labels",
            "labels.accent==\"\\xe9\"",
            "name~=\"\\xff\"",
            "labels.a~=x**",
            "labels.a==\"\\ud800\"",
            "labels.\"\\xff\"",
        ] {
            assert!(!accepts(&[no]), "{no}");
        }
    }

    /// containerd 1.6.20 and the scanner of 2.x refuse all of these.
    #[test]
    fn what_is_refused() {
        for bad in [
            ",",
            ".",
            " ",
            "=x",
            "a..b",
            "name.",
            "name,",
            "name ",
            "name ,kind",
            "name .a",
            "labels/a",
            "labels.|a|",
            "labels.é",
            "'name'",
            "name=x",
            "name===x",
            "name==!x",
            "name== !x",
            "name=!x",
            "name~x",
            "name@=x",
            "name==",
            "name== ",
            "name==,kind",
            "name==.a",
            "name==a b",
            "name==a ",
            "name==a ,kind",
            "name==a\u{1}",
            "name==a\u{200b}",
            "name==a\u{e000}",
            "name==a\0",
            "name==a\u{fffd}",
            "\0",
            "name==\"\u{fffd}\"",
            "name==\"a",
            "name==\"a\nb\"",
            "name==\"a\"b",
            "name==\"a\" ,kind",
            "name==/a/",
            "name==|a|",
            "name!=/a/",
            "name~=/a",
            "name~=/\\d/",
            "name~=|\\d|",
            "name~=\"\\d\"",
            "name~=/a\\|b/",
            "name~=/a/b",
            "\"\\q\"==1",
            "name==\"\\'\"",
            "name==\"\\/\"",
            "name==\"\\400\"",
            "name==\"\\08\"",
            "name==\"\\+1\"",
            "name==\"\\x+1\"",
            "name==\"\\u12\"",
            "name==\"\\U00110000\"",
        ] {
            let e = Filters::parse(&[bad.into()]).expect_err(bad);
            assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains("filter"), "{bad}: {e}");
            // One of several is enough.
            Filters::parse(&["name".into(), bad.into()]).unwrap_err();
        }
    }

    #[test]
    fn patterns_are_bounded_over_all_filters() {
        let parse = |filters: usize, each: usize| {
            let filter = vec!["name~=a"; each].join(",");
            Filters::parse(&vec![filter; filters]).map_err(|e| e.kind())
        };
        assert!(parse(1, 32).is_ok() && parse(32, 1).is_ok());
        for (filters, each) in [(1, 33), (33, 1), (2, 17)] {
            assert_eq!(parse(filters, each).unwrap_err(), ErrorKind::InvalidInput);
        }
    }

    proptest! {
        #[test]
        fn any_value_can_be_quoted(value in "[^\\p{C}\u{fffd}]*") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let filters = Filters::parse(&[format!("labels.l==\"{quoted}\"")]).unwrap();
            let mut there = snapshot();
            there.labels.insert("l".into(), value);
            prop_assert!(filters.accept(&there));
            prop_assert!(!filters.accept(&snapshot()));
        }

        #[test]
        fn nothing_makes_it_panic(text in "\\PC*") {
            let _ = Filters::parse(&[text]);
        }
    }
}

//! containerd's filter language, for listing snapshots.
//!
//! ```text
//! filter   = selector { "," selector }          all have to hold; of several filters one
//! selector = path [ operator value ]            without operator: the field is there
//! path     = field { "." field }                name, parent, kind, labels.LABEL
//! field    = letters, digits, "_" and "-", or a quoted string
//! operator = "==" | "!=" | "~="                 the last one takes a regular expression
//! value    = anything up to a comma or white space, or a quoted string; after "~=" also /…/ and |…|
//! ```

use super::row::Snapshot;
use graphdriver_core::{Error, ErrorKind, Result};
use regex::Regex;

/// Which snapshots are wanted.
#[derive(Debug)]
pub(super) struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// None: no regular expression, so that nothing matches it, as with containerd.
    Matches(Option<Regex>),
}

impl Filters {
    pub(super) fn parse(filters: &[String]) -> Result<Filters> {
        let parse = |text: &String| match text.as_str() {
            "" => Ok(Vec::new()),
            text => Parser { text, at: 0 }.filter(),
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
            Test::Equal(wanted) => value.is_some() && text == wanted,
            Test::NotEqual(unwanted) => text != unwanted,
            Test::Matches(pattern) => pattern.as_ref().is_some_and(|pattern| pattern.is_match(text)),
        }
    }
}

fn field(snapshot: &Snapshot, path: &[String]) -> Option<String> {
    match path[0].as_str() {
        "name" => Some(snapshot.name.clone()),
        "parent" => Some(snapshot.parent.clone().unwrap_or_default()),
        "kind" => Some(snapshot.kind.to_string()),
        "labels" => snapshot.labels.get(&path[1..].join(".")).cloned(),
        _ => None,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn filter(&mut self) -> Result<Vec<Selector>> {
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
        let operator = ["==", "!=", "~="].into_iter().find(|operator| self.take(operator));
        let test = match operator.ok_or_else(|| self.error("==, != or ~="))? {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            _ => Test::Matches(pattern(&self.value(true)?)),
        };
        Ok(Selector { path, test })
    }

    fn name(&mut self) -> Result<String> {
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let name = self.while_true(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if name.is_empty() { Err(self.error("a field's name")) } else { Ok(name) }
    }

    fn value(&mut self, pattern: bool) -> Result<String> {
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if pattern => self.quoted(),
            _ => {
                let value = self.while_true(|c| c != ',' && !c.is_whitespace());
                if value.is_empty() { Err(self.error("a value")) } else { Ok(value) }
            }
        }
    }

    /// A string in double quotes with Go's escapes, or a pattern in its own, where only the quote needs one.
    fn quoted(&mut self) -> Result<String> {
        let quote = self.next().expect("the caller has seen it");
        let mut text = String::new();
        loop {
            match self.next() {
                None | Some('\n') => return Err(self.error("the end of the quoted string")),
                Some(c) if c == quote => return Ok(text),
                Some('\\') if quote == '"' => text.push(self.escaped()?),
                Some('\\') => match self.next() {
                    Some(c) if c == quote => text.push(c),
                    other => text.extend(['\\'].into_iter().chain(other)),
                },
                Some(c) => text.push(c),
            }
        }
    }

    fn escaped(&mut self) -> Result<char> {
        let number = |parser: &mut Self, digits: usize, radix: u32| {
            let end = parser.at + digits;
            let value = parser.text.get(parser.at..end).and_then(|digits| u32::from_str_radix(digits, radix).ok());
            parser.at = end.min(parser.text.len());
            value.and_then(char::from_u32)
        };
        let c = match self.next() {
            Some('a') => Some('\x07'),
            Some('b') => Some('\x08'),
            Some('f') => Some('\x0c'),
            Some('n') => Some('\n'),
            Some('r') => Some('\r'),
            Some('t') => Some('\t'),
            Some('v') => Some('\x0b'),
            Some(c @ ('\\' | '"')) => Some(c),
            Some('x') => number(self, 2, 16),
            Some('u') => number(self, 4, 16),
            Some('U') => number(self, 8, 16),
            Some('0'..='7') => {
                self.at -= 1;
                number(self, 3, 8)
            }
            _ => None,
        };
        c.ok_or_else(|| self.error("an escape as in Go"))
    }

    /// The next character that is no white space.
    fn peek(&mut self) -> Option<char> {
        self.while_true(char::is_whitespace);
        self.text[self.at..].chars().next()
    }

    fn take(&mut self, token: &str) -> bool {
        self.peek();
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

fn pattern(text: &str) -> Option<Regex> {
    Regex::new(text).inspect_err(|e| tracing::warn!("the pattern {text:?} of a filter matches nothing: {e}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphdriver_core::{LayerId, store::LayerKind};
    use proptest::prelude::*;

    fn snapshot() -> Snapshot {
        let labels = [("a", "1"), ("containerd.io/gc.root", "x,y"), ("very complex", "q\"q")];
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
            &["kind == active , name != other"],
            &["kind==committed", "kind==active"],
            &["labels.a==1,labels.a!=2"],
            &["labels.\"containerd.io/gc.root\"==\"x,y\""],
            &["labels.\"very complex\"==\"q\\\"q\""],
            &["labels.missing!=1"],
            &["name~=/default\\/[0-9]+/"],
            &["name~=|t/\\d/k|"],
            &["name~=^def"],
            &["labels.a==\"\\x31\"", "kind==none"],
        ] {
            assert!(accepts(yes), "{yes:?}");
        }
        for no in ["name==other", "labels.missing", "labels.missing==\"\"", "kind==view", "size", "name~=/[/", "labels"]
        {
            assert!(!accepts(&[no]), "{no}");
        }
    }

    #[test]
    fn what_is_refused() {
        for bad in [
            ",",
            "name=x",
            "name==",
            "name==a b",
            "name==\"a",
            "=x",
            "name@=x",
            "a..b",
            "name,",
            "\"\\q\"==1",
            "name~=/a",
            "name==\"\\u12\"",
        ] {
            let e = Filters::parse(&[bad.into()]).unwrap_err();
            assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains("filter"), "{bad}: {e}");
        }
    }

    proptest! {
        #[test]
        fn any_value_can_be_quoted(value in "[^\\p{C}]*") {
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

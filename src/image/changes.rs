//! The changes `import -c` and `commit -c` take: instructions as in a Dockerfile (Dockerfile reference), those of them
//! that only change a configuration.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

const KNOWN: &str = "CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR";

/// A list of changes to the `config` section of an image configuration, applied in order.
#[derive(Debug, Clone, Default)]
pub struct Changes(Vec<(Instruction, String)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instruction {
    Cmd,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Label,
    Onbuild,
    Stopsignal,
    User,
    Volume,
    Workdir,
}

type Config = Map<String, Value>;

impl Changes {
    /// Parses instructions, each as one `-c` gives it. A line that ends in a backslash goes on in the next; empty lines
    /// and those that begin with `#` say nothing.
    ///
    /// # Errors
    /// `InvalidInput` for an unknown instruction or one whose arguments are wrong whatever they are applied to.
    pub fn parse<S: AsRef<str>>(lines: &[S]) -> Result<Changes> {
        let mut changes = Vec::new();
        for text in lines {
            for line in text.as_ref().replace("\\\n", " ").lines().map(str::trim) {
                if !line.is_empty() && !line.starts_with('#') {
                    changes.push(parse_line(line).doing(|| format!("reading the change {line:?}"))?);
                }
            }
        }
        // What names variables can be judged only together with what it is applied to.
        let fixed = changes.iter().filter(|(_, args)| !args.contains('$')).cloned().collect();
        Changes(fixed).apply(&mut Config::new())?;
        Ok(Changes(changes))
    }

    /// True if nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes the changes in `config`, the `config` section of an image configuration.
    pub fn apply(&self, config: &mut Config) -> Result<()> {
        let mut cmd_given = false;
        for (instruction, args) in &self.0 {
            cmd_given |= *instruction == Instruction::Cmd;
            if *instruction == Instruction::Entrypoint && !cmd_given {
                // The arguments of the old entry point make no sense to a new one (Dockerfile reference, ENTRYPOINT).
                config.shift_remove("Cmd");
            }
            apply(*instruction, args, config)
                .doing(|| format!("applying the change {:?}", format!("{instruction:?} {args}")))?;
        }
        Ok(())
    }
}

fn invalid(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, why)
}

fn parse_line(line: &str) -> Result<(Instruction, String)> {
    let (word, args) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let instruction = match word.to_ascii_uppercase().as_str() {
        "CMD" => Instruction::Cmd,
        "ENTRYPOINT" => Instruction::Entrypoint,
        "ENV" => Instruction::Env,
        "EXPOSE" => Instruction::Expose,
        "HEALTHCHECK" => Instruction::Healthcheck,
        "LABEL" => Instruction::Label,
        "ONBUILD" => Instruction::Onbuild,
        "STOPSIGNAL" => Instruction::Stopsignal,
        "USER" => Instruction::User,
        "VOLUME" => Instruction::Volume,
        "WORKDIR" => Instruction::Workdir,
        _ => return Err(invalid(format!("{word:?} changes no configuration; known are {KNOWN}"))),
    };
    match args.trim() {
        "" => Err(invalid(format!("{word} needs an argument"))),
        args => Ok((instruction, args.to_owned())),
    }
}

fn apply(instruction: Instruction, args: &str, config: &mut Config) -> Result<()> {
    match instruction {
        Instruction::Cmd => drop(config.insert("Cmd".into(), json!(command(args)))),
        Instruction::Entrypoint => match command(args) {
            none if none.is_empty() => drop(config.shift_remove("Entrypoint")),
            words => drop(config.insert("Entrypoint".into(), json!(words))),
        },
        Instruction::Env => {
            for (name, value) in pairs(args, config)? {
                set_env(config, &name, &value);
            }
        }
        Instruction::Label => {
            for (key, value) in pairs(args, config)? {
                object(config, "Labels").insert(key, json!(value));
            }
        }
        Instruction::Expose => {
            for word in split(args)? {
                for port in ports(&expand(&word, config)?)? {
                    object(config, "ExposedPorts").insert(port, json!({}));
                }
            }
        }
        Instruction::Volume => {
            let paths = match json_words(args) {
                Some(paths) => paths,
                None => split(args)?.iter().map(|w| expand(w, config)).collect::<Result<_>>()?,
            };
            for path in paths {
                if path.trim().is_empty() {
                    return Err(invalid("a volume needs a path"));
                }
                object(config, "Volumes").insert(path, json!({}));
            }
        }
        Instruction::Onbuild => onbuild(args, config)?,
        Instruction::Stopsignal => {
            let signal = expand(&one(args)?, config)?;
            check_signal(&signal)?;
            config.insert("StopSignal".into(), json!(signal));
        }
        Instruction::User => {
            let user = expand(&one(args)?, config)?;
            config.insert("User".into(), json!(user));
        }
        Instruction::Workdir => {
            let path = expand(args, config)?;
            let now = config.get("WorkingDir").and_then(Value::as_str).unwrap_or_default();
            let path = join(now, &path);
            config.insert("WorkingDir".into(), json!(path));
        }
        Instruction::Healthcheck => drop(config.insert("Healthcheck".into(), healthcheck(args)?)),
    }
    Ok(())
}

/// The JSON form as it is, anything else as an argument of the shell (Dockerfile reference, "Shell and exec form").
fn command(args: &str) -> Vec<String> {
    json_words(args).unwrap_or_else(|| vec!["/bin/sh".into(), "-c".into(), args.into()])
}

fn json_words(args: &str) -> Option<Vec<String>> {
    serde_json::from_str(args).ok()
}

/// An object in `config`, made if it is missing or null.
fn object<'c>(config: &'c mut Config, key: &str) -> &'c mut Config {
    if !config.get(key).is_some_and(Value::is_object) {
        config.insert(key.to_owned(), json!({}));
    }
    config[key].as_object_mut().expect("made just above")
}

fn set_env(config: &mut Config, name: &str, value: &str) {
    if !config.get("Env").is_some_and(Value::is_array) {
        config.insert("Env".into(), json!([]));
    }
    let list = config["Env"].as_array_mut().expect("made just above");
    let new = json!(format!("{name}={value}"));
    let same = |v: &&mut Value| v.as_str().and_then(|s| s.split_once('=')).is_some_and(|(n, _)| n == name);
    match list.iter_mut().find(same) {
        Some(old) => *old = new,
        None => list.push(new),
    }
}

fn get_env<'c>(config: &'c Config, name: &str) -> Option<&'c str> {
    let list = config.get("Env")?.as_array()?.iter();
    list.filter_map(|v| v.as_str()?.split_once('=')).find(|(n, _)| *n == name).map(|(_, value)| value)
}

/// `A=1 B="two words"`, or the old form `A all the rest`. All values expand from what was set before this instruction.
fn pairs(args: &str, config: &Config) -> Result<Vec<(String, String)>> {
    let words = split(args)?;
    if !words[0].contains('=') {
        let (name, rest) = args.split_once(char::is_whitespace).ok_or_else(|| invalid("write NAME=VALUE"))?;
        return Ok(vec![(expand(name, config)?, expand(rest.trim(), config)?)]);
    }
    let pair = |word: &String| {
        let (name, value) = word.split_once('=').ok_or_else(|| invalid(format!("{word:?} is not NAME=VALUE")))?;
        let name = expand(name, config)?;
        if name.is_empty() { Err(invalid(format!("{word:?} has no name"))) } else { Ok((name, expand(value, config)?)) }
    };
    words.iter().map(pair).collect()
}

/// Words as they stand, quotes and backslashes still in them.
fn split(args: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut chars = args.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quote != Some('\'') => {
                word.push(c);
                word.extend(chars.next());
                continue;
            }
            '"' | '\'' if quote.is_none() => quote = Some(c),
            c if quote == Some(c) => quote = None,
            c if c.is_whitespace() && quote.is_none() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            _ => {}
        }
        word.push(c);
    }
    if let Some(quote) = quote {
        return Err(invalid(format!("a {quote} is not closed")));
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// A word without its quotes, variables replaced outside single quotes: `$NAME`, `${NAME}`, `${NAME:-default}`,
/// `${NAME:+instead}` (Dockerfile reference, "Environment replacement").
fn expand(word: &str, config: &Config) -> Result<String> {
    let (mut out, mut quote) = (String::new(), None);
    let mut rest = word;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' if quote != Some('\'') => {
                let next = rest.chars().next();
                // Within double quotes a backslash stands for itself unless it protects one of these.
                if quote == Some('"') && !matches!(next, Some('"' | '\\' | '$')) {
                    out.push('\\');
                }
                out.extend(next);
                rest = &rest[next.map_or(0, char::len_utf8)..];
            }
            '"' | '\'' if quote.is_none() => quote = Some(c),
            c if quote == Some(c) => quote = None,
            '$' if quote != Some('\'') => rest = variable(rest, config, &mut out)?,
            _ => out.push(c),
        }
    }
    Ok(out)
}

/// Replaces the variable `text` begins with, after its dollar sign, and returns what follows it.
fn variable<'t>(text: &'t str, config: &Config, out: &mut String) -> Result<&'t str> {
    let name_len = |s: &str| s.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(s.len());
    let Some(inside) = text.strip_prefix('{') else {
        let (name, rest) = text.split_at(name_len(text));
        out.push_str(if name.is_empty() { "$" } else { get_env(config, name).unwrap_or_default() });
        return Ok(rest);
    };
    let (inside, rest) = inside.split_once('}').ok_or_else(|| invalid("a ${ is not closed"))?;
    let (name, modifier) = inside.split_at(name_len(inside));
    let value = get_env(config, name).filter(|v| !v.is_empty());
    if name.is_empty() {
        return Err(invalid(format!("${{{inside}}} is no variable")));
    }
    if let Some(default) = modifier.strip_prefix(":-") {
        out.push_str(value.unwrap_or(default));
    } else if let Some(instead) = modifier.strip_prefix(":+") {
        out.push_str(value.map_or("", |_| instead));
    } else if modifier.is_empty() {
        out.push_str(value.unwrap_or_default());
    } else {
        return Err(invalid(format!("${{{inside}}}: only :- and :+ are known")));
    }
    Ok(rest)
}

fn one(args: &str) -> Result<String> {
    let mut words = split(args)?;
    if words.len() == 1 { Ok(words.remove(0)) } else { Err(invalid("exactly one argument is needed")) }
}

/// `80`, `80/udp`, `8000-8003/tcp`, as the keys of `ExposedPorts`: `80/tcp`.
fn ports(word: &str) -> Result<Vec<String>> {
    let bad = || invalid(format!("{word:?} is no port; write 80, 80/udp or 8000-8010/tcp"));
    let (range, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last): (u16, u16) = (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") || first > last || first == 0 {
        return Err(bad());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

fn onbuild(args: &str, config: &mut Config) -> Result<()> {
    let word = args.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
    if matches!(word.as_str(), "ONBUILD" | "FROM" | "MAINTAINER") {
        return Err(invalid(format!("{word} is not allowed as an ONBUILD trigger")));
    }
    if !config.get("OnBuild").is_some_and(Value::is_array) {
        config.insert("OnBuild".into(), json!([]));
    }
    config["OnBuild"].as_array_mut().expect("made just above").push(json!(args));
    Ok(())
}

/// A number, a name with or without `SIG`, or a real-time signal: what `StopSignal` may be in the image specification.
fn check_signal(signal: &str) -> Result<()> {
    let name = signal.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let number = signal.parse::<u8>().is_ok_and(|n| (1..=64).contains(&n));
    let real_time = |base: &str, sign: char| {
        let offset = name.strip_prefix(base);
        offset
            .is_some_and(|o| o.is_empty() || o.strip_prefix(sign).is_some_and(|n| n.parse().is_ok_and(|n: u8| n < 31)))
    };
    let named = format!("SIG{name}").parse::<nix::sys::signal::Signal>().is_ok();
    if number || named || real_time("RTMIN", '+') || real_time("RTMAX", '-') {
        return Ok(());
    }
    Err(invalid(format!("{signal:?} is no signal; write a name such as SIGTERM or a number from 1 to 64")))
}

/// `path` seen from the directory `now`, without `.`, `..` and doubled slashes. It is text for the container's
/// runtime; nothing here opens it.
fn join(now: &str, path: &str) -> String {
    let whole = if path.starts_with('/') { path.to_owned() } else { format!("{now}/{path}") };
    let mut parts = Vec::new();
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    format!("/{}", parts.join("/"))
}

/// `NONE`, or options and `CMD …`. Durations are nanoseconds in the configuration.
fn healthcheck(args: &str) -> Result<Value> {
    let mut check = Map::new();
    let mut rest = args;
    while let Some(option) = rest.strip_prefix("--") {
        let (option, after) = option.split_once(char::is_whitespace).unwrap_or((option, ""));
        let (name, value) = option.split_once('=').ok_or_else(|| invalid(format!("write --{option}=VALUE")))?;
        let (key, value) = match name {
            "retries" => ("Retries", value.parse::<u32>().map(|n| json!(n)).map_err(|e| invalid(e.to_string()))?),
            "interval" => ("Interval", duration(value)?),
            "timeout" => ("Timeout", duration(value)?),
            "start-period" => ("StartPeriod", duration(value)?),
            "start-interval" => ("StartInterval", duration(value)?),
            _ => {
                let known = "--interval, --timeout, --start-period, --start-interval and --retries";
                return Err(invalid(format!("--{name} is unknown; known are {known}")));
            }
        };
        check.insert(key.to_owned(), value);
        rest = after.trim_start();
    }
    let (kind, command) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let test = match (kind.to_ascii_uppercase().as_str(), command.trim()) {
        ("NONE", "") if check.is_empty() => vec!["NONE".to_owned()],
        ("CMD", command) if !command.is_empty() => match json_words(command) {
            Some(words) => [vec!["CMD".to_owned()], words].concat(),
            None => vec!["CMD-SHELL".to_owned(), command.to_owned()],
        },
        _ => return Err(invalid("write HEALTHCHECK NONE or HEALTHCHECK [--interval=30s …] CMD COMMAND")),
    };
    check.shift_insert(0, "Test".to_owned(), json!(test));
    Ok(Value::Object(check))
}

fn duration(text: &str) -> Result<Value> {
    let parsed = text.parse::<jiff::SignedDuration>().ok();
    let nanos = parsed.and_then(|d| u64::try_from(d.as_nanos()).ok());
    let nanos = nanos.filter(|n| *n == 0 || *n >= 1_000_000);
    nanos
        .map(|n| json!(n))
        .ok_or_else(|| invalid(format!("{text:?} is no duration of 0 or at least 1ms; write 30s or 1m30s")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(start: Value, lines: &[&str]) -> Value {
        let mut config = start.as_object().unwrap().clone();
        Changes::parse(lines).unwrap().apply(&mut config).unwrap();
        Value::Object(config)
    }

    #[test]
    fn each_instruction_changes_its_field() {
        for (line, key, value) in [
            ("CMD [\"a\", \"b c\"]", "Cmd", json!(["a", "b c"])),
            ("cmd echo $HOME \"x\"", "Cmd", json!(["/bin/sh", "-c", "echo $HOME \"x\""])),
            ("CMD []", "Cmd", json!([])),
            ("ENTRYPOINT [\"/init\"]", "Entrypoint", json!(["/init"])),
            ("ENTRYPOINT exec top", "Entrypoint", json!(["/bin/sh", "-c", "exec top"])),
            ("ENV A=1 B=\"two words\" C=d\\ e F='$A'", "Env", json!(["A=1", "B=two words", "C=d e", "F=$A"])),
            ("ENV A all the rest", "Env", json!(["A=all the rest"])),
            ("EXPOSE 80 53/UDP 90-91", "ExposedPorts", json!({"80/tcp": {}, "53/udp": {}, "90/tcp": {}, "91/tcp": {}})),
            ("LABEL a.b=c \"d e\"=\"f\\\"g\"", "Labels", json!({"a.b": "c", "d e": "f\"g"})),
            ("LABEL a b c", "Labels", json!({"a": "b c"})),
            ("ONBUILD RUN x", "OnBuild", json!(["RUN x"])),
            ("STOPSIGNAL SIGINT", "StopSignal", json!("SIGINT")),
            ("STOPSIGNAL 9", "StopSignal", json!("9")),
            ("STOPSIGNAL RTMIN+3", "StopSignal", json!("RTMIN+3")),
            ("USER 1000:1000", "User", json!("1000:1000")),
            ("VOLUME /a /b", "Volumes", json!({"/a": {}, "/b": {}})),
            ("VOLUME [\"/a b\"]", "Volumes", json!({"/a b": {}})),
            ("WORKDIR /a/../b//c/.", "WorkingDir", json!("/b/c")),
            ("HEALTHCHECK NONE", "Healthcheck", json!({"Test": ["NONE"]})),
            (
                "HEALTHCHECK --interval=1m30s --retries=3 CMD curl -f x",
                "Healthcheck",
                json!({"Test": ["CMD-SHELL", "curl -f x"], "Interval": 90_000_000_000u64, "Retries": 3}),
            ),
        ] {
            assert_eq!(changed(json!({}), &[line])[key], value, "{line}");
        }
    }

    #[test]
    fn changes_build_on_what_is_there_and_on_each_other() {
        let start = json!({"Env": ["PATH=/bin", "X=1"], "Cmd": ["old"], "WorkingDir": "/w", "Volumes": null});
        let lines =
            ["ENV PATH=$PATH:/x", "ENV Y=${NO:-d}${X:+i}\\$Z", "WORKDIR sub", "ENTRYPOINT [\"e\"]", "VOLUME $X"];
        let want = json!({
            "Env": ["PATH=/bin:/x", "X=1", "Y=di$Z"], "WorkingDir": "/w/sub", "Volumes": {"1": {}}, "Entrypoint": ["e"]
        });
        assert_eq!(changed(start, &lines), want);
        for (line, why) in [("ENV A=${X", "not closed"), ("ENV A=${X:?y}", "only :-"), ("ENV A=${}", "no variable")] {
            let e = Changes::parse(&[line]).unwrap().apply(&mut Config::new()).expect_err(line);
            assert!(e.reason().contains(why), "{line}: {e}");
        }
        let unset = Changes::parse(&["VOLUME $X"]).unwrap().apply(&mut Config::new());
        assert!(unset.unwrap_err().reason().contains("needs a path"));
        let both = changed(json!({"Cmd": ["old"]}), &["CMD [\"c\"]", "ENTRYPOINT [\"e\"]"]);
        assert_eq!(both["Cmd"], json!(["c"]));
    }

    #[test]
    fn one_option_may_hold_several_lines() {
        let config = changed(json!({}), &["# note\nENV A=1 \\\n B=2\n\nUSER u"]);
        assert_eq!(config, json!({"Env": ["A=1", "B=2"], "User": "u"}));
    }

    #[test]
    fn wrong_changes_are_refused_with_the_reason() {
        for (line, why) in [
            ("RUN x", "known are CMD, ENTRYPOINT"),
            ("CMD", "needs an argument"),
            ("ENV A", "NAME=VALUE"),
            ("ENV =x", "no name"),
            ("ENV A=\"x", "not closed"),
            ("EXPOSE 0", "no port"),
            ("EXPOSE 70000", "no port"),
            ("EXPOSE 90-80", "no port"),
            ("EXPOSE 80/icmp", "no port"),
            ("ONBUILD FROM x", "not allowed"),
            ("STOPSIGNAL SIGNOPE", "no signal"),
            ("STOPSIGNAL 65", "no signal"),
            ("USER a b", "exactly one"),
            ("HEALTHCHECK NONE x", "HEALTHCHECK NONE"),
            ("HEALTHCHECK --nope=1 CMD x", "known are --interval"),
            ("HEALTHCHECK --interval=1 CMD x", "no duration"),
        ] {
            let e = Changes::parse(&[line]).expect_err(line);
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{line}");
            assert!(e.reason().contains(why), "{line}: {e}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(line in "(ENV|LABEL|EXPOSE|VOLUME|HEALTHCHECK|WORKDIR|STOPSIGNAL) [ -~é\\\\$\"'{}=]{0,30}") {
            let _ = Changes::parse(&[line]);
        }
    }
}

//! Any sequence of calls answers as a plain map would.

use crate::{
    client::{Labels, Service, labels},
    name, on,
    support::Random,
};
use graphdriver_containerd_api::snapshots::Kind;
use std::collections::BTreeMap;
use tonic::{Code, Status};

#[derive(Debug, Clone, PartialEq)]
struct Known {
    kind: Kind,
    parent: String,
    labels: Labels,
}

#[derive(Default)]
struct Model(BTreeMap<String, Known>);

impl Model {
    fn make(&mut self, kind: Kind, key: &str, parent: &str) -> Code {
        if self.0.contains_key(key) {
            return Code::AlreadyExists;
        }
        match self.0.get(parent).map(|parent| parent.kind) {
            None if !parent.is_empty() => return Code::NotFound,
            Some(Kind::Active | Kind::View) => return Code::InvalidArgument,
            _ => {}
        }
        self.0.insert(key.into(), Known { kind, parent: parent.into(), labels: Labels::new() });
        Code::Ok
    }

    fn commit(&mut self, name: &str, key: &str, labels: Labels) -> Code {
        if self.0.contains_key(name) {
            return Code::AlreadyExists;
        }
        match self.0.get(key).map(|known| known.kind) {
            None => Code::NotFound,
            Some(Kind::Active) => {
                let active = self.0.remove(key).unwrap();
                self.0.insert(name.into(), Known { kind: Kind::Committed, labels, ..active });
                Code::Ok
            }
            Some(_) => Code::FailedPrecondition,
        }
    }

    fn remove(&mut self, key: &str) -> Code {
        if self.0.values().any(|known| known.parent == key) {
            return Code::FailedPrecondition;
        }
        self.0.remove(key).map_or(Code::NotFound, |_| Code::Ok)
    }

    fn update(&mut self, key: &str, labels: Labels) -> Code {
        self.0.get_mut(key).map_or(Code::NotFound, |known| {
            known.labels = labels;
            Code::Ok
        })
    }
}

fn code<T>(reply: Result<T, Status>) -> Code {
    reply.err().map_or(Code::Ok, |status| status.code())
}

fn listed(s: &Service, filters: &[&str]) -> BTreeMap<String, Known> {
    let known = |info: graphdriver_containerd_api::snapshots::Info| {
        (info.name.clone(), Known { kind: info.kind(), parent: info.parent, labels: info.labels })
    };
    s.list(filters).unwrap().into_iter().map(known).collect()
}

#[test]
fn any_sequence_of_calls_answers_as_a_plain_map() {
    on(&name(module_path!(), "any_sequence_of_calls_answers_as_a_plain_map"), crate::rigs::On::Overlay2, |mut s| {
        let dir = s.root.parent().unwrap().to_owned();
        let mut random = Random::new(5);
        let mut model = Model::default();
        for step in 0..1500 {
            let mut pick = || ["a", "b", "c", "d", "e", "f", "g"][random.below(7) as usize];
            let (one, other) = (pick(), pick());
            let parent = if random.below(3) == 0 { "" } else { other };
            let some = labels(&[("n", &random.below(3).to_string())]);
            let (said, expected) = match random.below(16) {
                0..5 => (code(s.prepare(one, parent)), model.make(Kind::Active, one, parent)),
                5..7 => (code(s.view(one, parent)), model.make(Kind::View, one, parent)),
                7..11 => (code(s.commit_with(one, other, some.clone())), model.commit(one, other, some)),
                11..14 => (code(s.remove(one)), model.remove(one)),
                14 => {
                    let mut info = s.stat(one).unwrap_or_default();
                    (info.name, info.labels) = (one.into(), some.clone());
                    (code(s.update(info, &[])), model.update(one, some))
                }
                _ if step % 10 == 0 => {
                    assert!(s.stop().success());
                    s = Service::start(&dir, "overlay2");
                    continue;
                }
                _ => (code(s.cleanup()), Code::Ok),
            };
            assert_eq!(said, expected, "step {step}: {one} {other} {:?}", model.0);
            assert_eq!(listed(&s, &[]), model.0, "step {step}");
            let mut ones = model.0.clone();
            ones.retain(|_, known| known.kind != Kind::View && known.labels.get("n").is_some_and(|n| n == "1"));
            assert_eq!(listed(&s, &["kind!=view,labels.n==1"]), ones);
        }
        s.cleanup().unwrap();
        let stored = model.0.values().filter(|known| known.kind != Kind::View || known.parent.is_empty());
        assert_eq!(s.stored().len(), stored.count());
    });
}

//! Is an image shown twice under names whose locks do not see each other?
//!
//! A lock sits on the inode that was opened. Two nodes of one block device are two inodes, and so are a file of an overlay
//! and the same file in the layer below: whoever locks one of them does not stop whoever opens the other. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::finding::{Severity, finding};
use super::sample::ImageSample;
use super::snapshot::Image;
use crate::linux::identity::Device;
use crate::linux::mounts::Mount;
use crate::text::escape_path;

/// Adds to each image that has an alias among the others what that means. `raw` is in the order of `images`.
pub(super) fn aliases(images: &mut [Image], raw: &[ImageSample]) {
    let mut found: Vec<(usize, &'static str, String)> = Vec::new();
    let mut nodes: BTreeMap<Device, Vec<usize>> = BTreeMap::new();
    for (i, image) in raw.iter().enumerate() {
        if let Some(device) = image.device {
            nodes.entry(device).or_default().push(i);
        }
    }
    for same in nodes.values() {
        for i in same {
            let other = same.iter().find(|o| raw[**o].file != raw[*i].file);
            found.extend(other.map(|o| {
                let text = format!(
                    "{} is another node of the same block device: locks through one are invisible through the other",
                    escape_path(&raw[*o].path)
                );
                (*i, "device-alias", text)
            }));
        }
    }
    let by_path: BTreeMap<&Path, usize> = raw.iter().enumerate().map(|(i, r)| (r.resolved.as_path(), i)).collect();
    for (i, merged) in raw.iter().enumerate() {
        let Some(mount) = merged.mount.as_deref().filter(|m| m.kind == "overlay") else { continue };
        let in_layers = layers(mount).filter_map(|layer| {
            let path = layer.join(merged.resolved.strip_prefix(&mount.point).ok()?);
            by_path.get(path.as_path()).copied()
        });
        for layer in in_layers.filter(|l| raw[*l].file != merged.file) {
            let text = |other: &ImageSample, what: &str| {
                format!(
                    "{} is the same file {what}: locks through one are invisible through the other",
                    escape_path(&other.path)
                )
            };
            found.push((i, "overlay-alias", text(&raw[layer], "in a layer of this overlay")));
            found.push((layer, "overlay-alias", text(merged, "in an overlay on this directory")));
        }
    }
    for (i, code, text) in found {
        let in_use = |i: &Image| !i.held().is_empty() || !i.openers.is_empty();
        let severity = if in_use(&images[i]) { Severity::Danger } else { Severity::Warning };
        let at = images[i].findings.partition_point(|f| f.severity >= severity);
        images[i].findings.insert(at, finding(code, severity, text));
    }
}

/// The directories that an overlay is made of, as its mount options name them (a comma or colon in a name is escaped
/// there, and such a layer is not found).
fn layers(mount: &Mount) -> impl Iterator<Item = PathBuf> {
    let of = |option: &'_ str| {
        let (name, value) = option.split_once('=')?;
        matches!(name, "lowerdir" | "upperdir" | "lowerdir+" | "datadir+").then(|| value.to_owned())
    };
    let values: Vec<String> = mount.options.iter().filter_map(|o| of(o)).collect();
    values.into_iter().flat_map(|v| v.split(':').map(PathBuf::from).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::mounts::Reach;
    use crate::monitor::examples::{holds, image, mount, process, sample};
    use crate::monitor::snapshot::Snapshot;
    use std::sync::Arc;

    fn codes(images: Vec<ImageSample>) -> Vec<Vec<(String, Severity)>> {
        let snapshot = Snapshot::of(&sample(images, &[process(42, "qemu-system-x86", Some("a"))]));
        let of = |i: &Image| i.findings.iter().map(|f| (f.code.clone(), f.severity)).collect();
        snapshot.images.iter().map(of).collect()
    }

    #[test]
    fn two_nodes_of_one_device_are_told_on_both() {
        let node = |path, inode, minor| {
            let mut node = image(path, "-/-");
            (node.file.inode, node.device) = (inode, Some(Device { major: 7, minor }));
            node
        };
        let alias = |severity| vec![("device-alias".to_owned(), severity)];
        let mut held = ImageSample { descriptors: vec![holds(42, "cw/w")], ..node("a", 1, 3) };
        held.answer = image("a", "cw/w").answer;
        assert_eq!(codes(vec![held, node("b", 2, 3)]), [alias(Severity::Danger), alias(Severity::Warning)]);
        // Hard links of one node, or nodes of two devices, are none.
        assert_eq!(codes(vec![node("a", 1, 3), node("b", 1, 3), node("c", 2, 4)]), [vec![], vec![], vec![]]);
    }

    #[test]
    fn an_overlay_and_its_layer_are_told_on_both() {
        let options = vec!["lowerdir=/lower/1:/lower/2".to_owned(), "upperdir=/upper".to_owned()];
        let overlay = Mount { options, point: "/merged".into(), ..(*mount("overlay", Reach::Local)).clone() };
        let at = |path: &str, inode| {
            let mut one = image(path, "-/-");
            (one.path, one.resolved, one.file.inode) = (path.into(), path.into(), inode);
            one
        };
        let merged = ImageSample { mount: Some(Arc::new(overlay)), ..at("/merged/d/a.raw", 1) };
        let told = codes(vec![merged, at("/lower/2/d/a.raw", 2), at("/lower/2/a.raw", 3)]);
        let alias = vec![("overlay-alias".to_owned(), Severity::Warning)];
        assert_eq!(told, [alias.clone(), alias, vec![]]);
    }
}

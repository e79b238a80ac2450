//! Is an image shown twice under names whose locks do not see each other?
//!
//! A lock sits on the inode that was opened. Two nodes of one block device are two inodes, and so are a file of an overlay
//! and the same file in the layer below: whoever locks one of them does not stop whoever opens the other. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::finding::{Severity, finding};
use super::sample::ImageSample;
use super::snapshot::Image;
use crate::linux::identity::{Device, FileId};
use crate::text::escape_path;

/// Adds to each image that has an alias among the others what that means. `raw` is in the order of `images`.
pub(super) fn aliases(images: &mut [Image], raw: &[Arc<ImageSample>]) {
    let mut found: Vec<(usize, usize, &'static str, String)> = Vec::new();
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
                (*i, *o, "device-alias", text)
            }));
        }
    }
    let mut by_file: BTreeMap<FileId, Vec<usize>> = BTreeMap::new();
    for (i, image) in raw.iter().enumerate() {
        by_file.entry(image.file).or_default().push(i);
    }
    for (i, merged) in raw.iter().enumerate() {
        let layer = merged.layer.filter(|layer| *layer != merged.file);
        for layer in layer.and_then(|l| by_file.get(&l)).into_iter().flatten().copied() {
            let text = |other: &ImageSample, what: &str| {
                format!(
                    "{} is the same file {what}: locks through one are invisible through the other",
                    escape_path(&other.path)
                )
            };
            found.push((i, layer, "overlay-alias", text(&raw[layer], "in a layer of this overlay")));
            found.push((layer, i, "overlay-alias", text(merged, "in an overlay on this directory")));
        }
    }
    for (i, other, code, text) in found {
        // Whichever of the two is in use, it is the other that nothing guards.
        let in_use = images[i].is_in_use() || images[other].is_in_use();
        let severity = if in_use { Severity::Danger } else { Severity::Warning };
        let at = images[i].findings.partition_point(|f| f.severity >= severity);
        images[i].findings.insert(at, finding(code, severity, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::{holds, image, process, sample};
    use crate::monitor::snapshot::Snapshot;

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
        assert_eq!(codes(vec![held, node("b", 2, 3)]), [alias(Severity::Danger), alias(Severity::Danger)]);
        // Hard links of one node, or nodes of two devices, are none.
        assert_eq!(codes(vec![node("a", 1, 3), node("b", 1, 3), node("c", 2, 4)]), [vec![], vec![], vec![]]);
    }

    #[test]
    fn an_overlay_and_its_layer_are_told_on_both() {
        let at = |path, inode| {
            let mut one = image(path, "-/-");
            one.file.inode = inode;
            one
        };
        let (layer, other) = (at("layer", 2), at("other", 3));
        let merged = ImageSample { layer: Some(layer.file), ..at("merged", 1) };
        let alias = vec![("overlay-alias".to_owned(), Severity::Warning)];
        assert_eq!(codes(vec![merged, layer, other]), [alias.clone(), alias, vec![]]);
    }
}

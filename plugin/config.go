package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/preroute/preroute/plugin/backend"
	"github.com/preroute/preroute/plugin/redirect"
)

// Annotations of a pod that the plugin reads.
const (
	policyAnnotation = "preroute.io/policy"
	pathAnnotation   = "preroute.io/path"
)

// annotationsCapability is the runtimeConfig entry in which containerd (1.5.0
// and later) and CRI-O pass the annotations of the pod.
const annotationsCapability = "io.kubernetes.cri.pod-annotations"

// config is the plugin's entry in the conflist, with what the runtime adds.
type config struct {
	CNIVersion        string                     `json:"cniVersion"`
	Name              string                     `json:"name"`
	Backend           string                     `json:"backend"`
	Policy            json.RawMessage            `json:"policy"`
	NodeSocket        string                     `json:"nodeSocket"`
	ExcludeNamespaces []string                   `json:"excludeNamespaces"`
	LogLevel          string                     `json:"logLevel"`
	RuntimeConfig     map[string]json.RawMessage `json:"runtimeConfig"`
	PrevResult        json.RawMessage            `json:"prevResult"`
}

// defaultExcluded are the namespaces whose pods start also while the node's
// socket does not answer: without them the cluster could not heal it.
var defaultExcluded = []string{"kube-system", "kube-public", "kube-node-lease", "preroute-system"}

func parseConfig(stdin []byte) (*config, error) {
	c := &config{ExcludeNamespaces: defaultExcluded}
	if err := json.Unmarshal(stdin, c); err != nil {
		return nil, fmt.Errorf("network configuration: %w", err)
	}
	return c, nil
}

func (c *config) validate() error {
	if c.Backend != "" && !slices.Contains(backend.Names, c.Backend) {
		return fmt.Errorf("network configuration: backend: %q: want one of %s", c.Backend, strings.Join(backend.Names, ", "))
	}
	return nil
}

// annotations are those of the pod that concern the plugin, as the runtime
// passed them; nil where it did not. A value that is not a string is the
// caller's to refuse: only a pod that has a policy may fail.
func (c *config) annotations() (path, policy json.RawMessage) {
	raw := c.RuntimeConfig[annotationsCapability]
	if len(raw) == 0 {
		return nil, nil
	}
	var all map[string]json.RawMessage
	if json.Unmarshal(raw, &all) != nil {
		return nil, nil
	}
	value := func(name string) json.RawMessage {
		if v := all[name]; string(v) != "null" {
			return v
		}
		return nil
	}
	return value(pathAnnotation), value(policyAnnotation)
}

// policy says what the pod asks for: the annotation, else the configuration's
// policy, else what the node's socket answers. nil means that the pod has none,
// and then nothing has been opened but the socket, where one is configured.
func (c *config) policy(pod podArgs) (*redirect.Policy, error) {
	source := policyAnnotation
	path, text := c.annotations()
	if text == nil && hasValue(c.Policy) {
		source, text = "network configuration: policy", c.Policy
	} else if text != nil {
		var s string
		if err := json.Unmarshal(text, &s); err != nil {
			return nil, &policyError{source, fmt.Errorf("%.80s: want a string that holds JSON", text)}
		}
		text = json.RawMessage(s)
	}
	if skip, err := skips(path); skip || (err != nil && text != nil) {
		return nil, err
	}
	if text == nil && c.NodeSocket != "" {
		answer, err := askNode(c.NodeSocket, pod)
		if err != nil {
			if slices.Contains(c.ExcludeNamespaces, pod.Namespace) {
				return nil, nil
			}
			return nil, err
		}
		if answer.Path == "init" || answer.Path == "none" || answer.Policy == "" {
			return nil, nil
		}
		source, text = "policy from "+c.NodeSocket, json.RawMessage(answer.Policy)
	}
	if text == nil {
		return nil, nil
	}
	p, err := redirect.Parse(string(text))
	if err != nil {
		return nil, &policyError{source, err}
	}
	return p, nil
}

func hasValue(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }

// skips reads the path annotation: on "init" and "none" the plugin keeps out.
func skips(raw json.RawMessage) (bool, error) {
	if raw == nil {
		return false, nil
	}
	var path string
	if err := json.Unmarshal(raw, &path); err != nil {
		path = string(raw)
	}
	switch path {
	case "cni":
		return false, nil
	case "init", "none":
		return true, nil
	}
	return false, &policyError{pathAnnotation, fmt.Errorf("%.80q: want cni, init or none", path)}
}

// A policyError is a mistake in what the pod or the configuration says.
type policyError struct {
	source string
	err    error
}

func (e *policyError) Error() string { return e.source + ": " + e.err.Error() }
func (e *policyError) Unwrap() error { return e.err }
